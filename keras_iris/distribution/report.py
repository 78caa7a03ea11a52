"""What of a model each device holds."""

import dataclasses
import math
import warnings
from typing import Any

import keras
import numpy as np

# Of all bytes; norms and biases are less.
_LARGEST_WHOLE_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class ShardingReport:
    """What of a model each device holds; `print` it.

    Attributes:
        num_devices: Number of devices.
        num_bytes: Of all variables, each counted once.
        bytes_per_device: What every device holds.
        whole: Bytes of the variables that every device has a copy of, by
            path, the largest first.
    """

    num_devices: int
    num_bytes: int
    bytes_per_device: int
    whole: dict[str, int]

    @property
    def whole_share(self) -> float:
        """Share of all bytes that every device has a copy of."""
        return sum(self.whole.values()) / max(1, self.num_bytes)

    def __str__(self) -> str:
        """A few lines."""
        ideal = self.num_bytes / self.num_devices
        lines = [
            f"{self.num_devices} devices hold {_mib(self.bytes_per_device)} "
            f"each, {self.bytes_per_device / max(1, ideal):.2f} of an equal "
            f"share of {_mib(self.num_bytes)}; {self.whole_share:.1%} is on "
            "every device."
        ]
        for path, size in list(self.whole.items())[:5]:
            lines.append(f"  whole: {path}, {_mib(size)}")
        if len(self.whole) > 5:
            lines.append(f"  and {len(self.whole) - 5} smaller ones")
        if self.whole_share > _LARGEST_WHOLE_SHARE:
            lines.append(
                "  More than 5%: the devices don't divide these. Take another "
                "number of them, such as a power of two."
            )
        return "\n".join(lines)


def sharding_report(model: keras.Model) -> ShardingReport:
    """What of a model's variables each device holds, on JAX.

    Args:
        model: Made under a distribution; its optimizer's variables count,
            where it has some.

    Returns:
        The report. A variable is whole if it is on every device, because
        it is small or because the devices divide none of its dimensions. If
        these are more than 5% of all bytes, there is a warning.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    total = here = num_devices = 0
    whole: dict[str, int] = {}
    for variable in variables:
        sharding: Any = variable.value.sharding
        width = np.dtype(variable.value.dtype).itemsize
        size = math.prod(variable.shape) * width
        part = math.prod(sharding.shard_shape(tuple(variable.shape))) * width
        num_devices = max(num_devices, len(sharding.device_set))
        total, here = total + size, here + part
        if part == size:
            whole[variable.path] = whole.get(variable.path, 0) + size
    if num_devices == 1:
        whole = {}
    ordered = sorted(whole.items(), key=lambda item: -item[1])
    report = ShardingReport(num_devices, total, here, dict(ordered))
    # All of it is where the strategy cuts no weights.
    if _LARGEST_WHOLE_SHARE < report.whole_share < 1:
        warnings.warn(str(report), stacklevel=2)
    return report


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
