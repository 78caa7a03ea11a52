"""Rotary embeddings in config.json, in old and new files."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from keras_iris.hub.entries import read_number

_LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_FULL, _LOCAL = "full_attention", "sliding_attention"


class Rope(NamedTuple):
    """A rotary embedding.

    Attributes:
        theta: The base of the wavelengths.
        factor: Positions are divided by it.
        llama3: Llama 3's scaling: its factor, the factors of low and high
            frequencies, and the original length; or `None`.
    """

    theta: float
    factor: float = 1.0
    llama3: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """The entries `rope_theta` and `rope_scaling`."""
        scaling: dict[str, Any] | None = None
        if self.llama3 is not None:
            values = dict(zip(_LLAMA3, self.llama3, strict=True))
            scaling = {"rope_type": "llama3", **values}
        elif self.factor != 1.0:
            scaling = {"rope_type": "linear", "factor": self.factor}
        return {"rope_theta": self.theta, "rope_scaling": scaling}


def read_ropes(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    kinds: Collection[str],
) -> tuple[Rope, Rope]:
    """The rotary embeddings of layers without and with a window.

    Old files have `rope_theta`, `rope_scaling` and, for layers with a window,
    `rope_local_base_freq`; transformers 5 writes all into `rope_parameters`.

    Args:
        config: The content of config.json.
        defaults: The architecture's defaults.
        kinds: The kinds of scaling that KerasHub's layer knows.

    Raises:
        ValueError: If there is something that KerasHub's layers don't do.
    """
    parameters = _object(config, "rope_parameters")
    theta = config.get("rope_theta") or defaults["rope_theta"]
    full = {"rope_theta": theta, **_object(config, "rope_scaling")}
    if _FULL in parameters:
        full |= _object(parameters, _FULL)
    else:
        full |= parameters
    local = full
    if "rope_local_base_freq" in defaults:
        base = config.get("rope_local_base_freq")
        local = {"rope_theta": base or defaults["rope_local_base_freq"]}
        local |= _object(parameters, _LOCAL)
    return _read(full, kinds), _read(local, kinds)


def _read(entries: Mapping[str, Any], kinds: Collection[str]) -> Rope:
    kind = entries.get("rope_type", entries.get("type")) or "default"
    if kind not in kinds:
        raise ValueError(
            f"config.json scales the rotary embedding by {kind!r}. Expected "
            f"one of {list(kinds)}: KerasHub's model of this type would give "
            "wrong logits. Use another checkpoint, or remove the scaling if "
            "prompts stay within the original length."
        )
    needed = {"linear": ("factor",), "llama3": _LLAMA3}.get(kind, ())
    known = {"rope_type", "type", "rope_theta", *needed}
    for name, value in entries.items():
        if name not in known and not _is_off(name, value):
            raise ValueError(
                f"config.json has {name}={value!r} for the rotary embedding, "
                "which keras_iris doesn't read: the logits could be wrong. "
                "Use another checkpoint."
            )
    theta = read_number(entries, "rope_theta")
    values = tuple(read_number(entries, name) for name in needed)
    if kind == "llama3":
        return Rope(theta, llama3=values)
    return Rope(theta, factor=values[0] if values else 1.0)


def _is_off(name: str, value: Any) -> bool:
    return not value or (name == "partial_rotary_factor" and value == 1.0)


def _object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    entry = config.get(name) or {}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"config.json has {name}={entry!r}, expected an object. "
            "Download the file again."
        )
    return dict(entry)
