"""From the sizes of a mesh to Keras' distribution."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import keras

from keras_iris.distribution.sharded_parallel import (
    DATA,
    MODEL,
    ShardedParallel,
)

Strategy = Literal["fsdp", "2d", "data"]


def read_mesh(text: str) -> dict[str, int] | Literal["auto"]:
    """A mesh as a command line has it.

    Args:
        text: `"data=8"`, `"data=2,model=4"`, or `"auto"` for all devices.

    Returns:
        Numbers of devices by the names of the axes, or `"auto"`.

    Raises:
        ValueError: It is something else.
    """
    if text == "auto":
        return "auto"
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(size.isdecimal() for _, _, size in pairs):
        raise ValueError(f"Expected such as data=8. Received: {text!r}")
    return {name: int(size) for name, _, size in pairs}


def make_distribution(
    mesh: Mapping[str, int] | Literal["auto"] = "auto",
    strategy: Strategy = "fsdp",
) -> Any:
    """Makes a distribution over the devices of all processes, on JAX.

    Make it current with `keras.distribution.set_distribution` before the
    model is loaded; `docs/distribution.md` shows it.

    Args:
        mesh: Devices of the axes `"data"`, over which batches are cut, and
            `"model"`, over which the matrices of `"2d"` are. `"auto"` takes
            all devices; of `"2d"`, as many for `"model"` as divide them and
            are at most their root.
        strategy: `"fsdp"`: weights, gradients and the optimizer's state are
            cut over the axis of the data, and gathered layer by layer, but
            for generation all at once.
            `"2d"`: the same, and matrices are cut over the axis of the model
            as well, heads and feed-forward units by columns and rows.
            `"data"`: every device has the whole model.

    Returns:
        A `keras.distribution.Distribution`.

    Raises:
        ValueError: Keras doesn't run on JAX, or there are no such devices.
    """
    name = keras.backend.backend()
    if name != "jax":
        raise ValueError(
            f"keras.distribution needs JAX, Keras runs on {name!r}. Set "
            "KERAS_BACKEND=jax; on PyTorch start the program with torchrun, on "
            "TensorFlow make the model under tf.distribute.MirroredStrategy."
        )
    devices = keras.distribution.list_devices()
    sizes = mesh_sizes(mesh, strategy, len(devices))
    device_mesh = keras.distribution.DeviceMesh(
        tuple(sizes.values()), list(sizes), devices[: math.prod(sizes.values())]
    )
    if strategy == "data":
        return keras.distribution.DataParallel(
            device_mesh=device_mesh, auto_shard_dataset=False
        )
    return ShardedParallel(device_mesh)


def mesh_sizes(
    mesh: Any, strategy: str, most: int | None = None
) -> dict[str, int]:
    """The number of devices of each axis, checked.

    Args:
        mesh: As in `make_distribution`.
        strategy: As there.
        most: Devices that there are, if that matters.
    """
    if strategy not in ("fsdp", "2d", "data"):
        raise ValueError(
            "`strategy` has to be 'fsdp', '2d' or 'data'. Received: "
            f"{strategy!r}"
        )
    names = [DATA, MODEL] if strategy == "2d" else [DATA]
    if mesh == "auto":
        num_devices = len(keras.distribution.list_devices())
        divisors = range(1, math.isqrt(num_devices) + 1)
        model = max(i for i in divisors if num_devices % i == 0)
        sizes = {DATA: num_devices, MODEL: 1}
        if strategy == "2d":
            sizes = {DATA: num_devices // model, MODEL: model}
        return {name: sizes[name] for name in names}
    sizes = dict(mesh)
    is_right = set(sizes) == set(names) and all(
        isinstance(size, int) and size >= 1 for size in sizes.values()
    )
    if not is_right or (most and math.prod(sizes.values()) > most):
        limit = f", {most} in all at most" if most else ""
        raise ValueError(
            f"`mesh` has to be 'auto' or the devices of {' and '.join(names)} "
            f"for strategy={strategy!r}{limit}. Received: {mesh!r}"
        )
    return {name: sizes[name] for name in names}
