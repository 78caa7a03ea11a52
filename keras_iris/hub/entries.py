"""Entries of config.json, checked as they are read."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from keras_iris.data.rows import shorten

_FLAGS = ("tie_word_embeddings", "norm_topk_prob", "output_router_logits")
# Lists for all layers.
_BY_LAYER = ("layer_types", "no_rope_layers")
# The most of them: a damaged file mustn't fill the memory with names.
_MOST = dict.fromkeys(
    ("num_hidden_layers", "num_experts", "num_local_experts"), 1000
)
_OPTIONAL = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
)


def read_entry(content: Mapping[str, Any], name: str) -> Any:
    """An entry, of the type that it ought to have."""
    value = content.get(name)
    if name in _FLAGS:
        return bool(value)
    if name == "mlp_only_layers":
        return _layers(name, value or [])
    if name in _BY_LAYER:
        return _list(content, name)
    if name == "router_aux_loss_coef":
        return read_number(content, name) if value else 0.0
    if not value and name in _OPTIONAL:
        return None
    if name == "rms_norm_eps" or name.endswith("softcapping"):
        return read_number(content, name)
    return read_integer(content, name)


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    """An entry with a value for each layer."""
    num_layers = read_integer(content, "num_hidden_layers")
    values = content.get(name)
    if not values and name == "layer_types":
        return num_layers * [_FULL]
    if not values:
        usual = {"no_rope_layer_interval": 4}
        interval = read_integer(usual | dict(content), *usual)
        return [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(values, list) or len(values) != num_layers:
        raise ValueError(
            f"config.json has {name}={shorten(repr(values))}, expected a list "
            f"of {num_layers}, for as many layers. Download the file again."
        )
    return values


def _layers(name: str, values: Any) -> list[int]:
    """An entry that lists layers by their numbers."""
    if not isinstance(values, list) or not all(map(is_integer, values)):
        raise ValueError(
            f"config.json has {name}={shorten(repr(values))}, expected a list "
            "of layers' numbers. Download the file again."
        )
    return values


def is_integer(value: Any) -> bool:
    """Whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_integer(content: Mapping[str, Any], name: str) -> int:
    """An entry that has to be a number of things."""
    value, most = read_number(content, name), _MOST.get(name, 2**31)
    if not 1 <= value <= most or value != int(value):
        raise ValueError(
            f"config.json has {name}={value!r}, expected a whole number up to "
            f"{most}. Download the file again."
        )
    return int(value)


def read_number(content: Mapping[str, Any], name: str) -> float:
    """An entry that has to be a number above 0."""
    value = content.get(name)
    if value is None:
        raise ValueError(
            f"config.json has no entry {name!r}, which this model needs. "
            "Download the file again."
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2**63:
        raise ValueError(
            f"config.json has {name}={shorten(repr(value))}, expected a number "
            "above 0. Download the file again."
        )
    return float(value)


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
    scaling = _object(config, "rope_scaling")
    full = {"rope_theta": config.get("rope_theta") or defaults["rope_theta"]}
    if "rope_local_base_freq" not in defaults:
        rope = _read(full | (scaling or parameters), kinds)
        return rope, rope
    if parameters.keys() - {_FULL, _LOCAL}:
        raise ValueError(
            f"config.json has rope_parameters={shorten(repr(parameters))}, "
            f"expected objects {_FULL!r} and {_LOCAL!r}: the layers of this "
            "model have two rotary embeddings. Use another checkpoint."
        )
    base = config.get("rope_local_base_freq")
    local = {"rope_theta": base or defaults["rope_local_base_freq"]}
    return (
        _read(full | _object(parameters, _FULL) | scaling, kinds),
        _read(local | _object(parameters, _LOCAL), kinds),
    )


def _read(entries: Mapping[str, Any], kinds: Collection[str]) -> Rope:
    kind = entries.get("rope_type", entries.get("type")) or "default"
    if kind not in kinds:
        raise ValueError(
            f"config.json scales the rotary embedding by "
            f"{shorten(repr(kind))}. Expected "
            f"one of {list(kinds)}: KerasHub's model of this type would give "
            "wrong logits. Use another checkpoint, or remove the scaling if "
            "prompts stay within the original length."
        )
    needed = {"linear": ("factor",), "llama3": _LLAMA3}.get(kind, ())
    known = {"rope_type", "type", "rope_theta", *needed}
    for name, value in entries.items():
        if name not in known and not _is_off(name, value):
            raise ValueError(
                f"config.json has {shorten(f'{name}={value!r}')} for the "
                "rotary embedding, "
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
            f"config.json has {name}={shorten(repr(entry))}, expected an "
            "object. "
            "Download the file again."
        )
    return dict(entry)
