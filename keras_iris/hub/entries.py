"""Entries of config.json, checked as they are read."""

from collections.abc import Mapping
from typing import Any

_FLAGS = ("tie_word_embeddings", "norm_topk_prob")
# Lists for all layers, and what is in those that are left out, if anything.
_BY_LAYER = {"layer_types": "full_attention", "no_rope_layers": None}
_OPTIONAL = ("attn_logit_softcapping", "final_logit_softcapping")


def read_entry(content: Mapping[str, Any], name: str) -> Any:
    """An entry, of the type that it ought to have."""
    value = content.get(name)
    if name in _FLAGS:
        return bool(value)
    if name == "mlp_only_layers":
        return [int(layer) for layer in value or ()]
    if name in _BY_LAYER:
        return _list(content, name, _BY_LAYER[name])
    if name == "router_aux_loss_coef":
        return float(value or 0.0)
    if name == "sliding_window" and not value:
        return None
    if name in _OPTIONAL and value is None:
        return None
    if name == "rms_norm_eps" or name in _OPTIONAL:
        return read_number(content, name)
    return read_integer(content, name)


def _list(content: Mapping[str, Any], name: str, default: Any) -> list[Any]:
    """An entry with a value for each layer."""
    num_layers = read_integer(content, "num_hidden_layers")
    values = content.get(name)
    if not values and default is not None:
        return num_layers * [default]
    if not isinstance(values, list) or len(values) != num_layers:
        raise ValueError(
            f"config.json has {name}={values!r}, expected a list of "
            f"{num_layers}, for as many layers. Download the file again."
        )
    return values


def read_integer(content: Mapping[str, Any], name: str) -> int:
    """An entry that has to be a number of things."""
    return int(read_number(content, name))


def read_number(content: Mapping[str, Any], name: str) -> float:
    """An entry that has to be a number above 0."""
    value = content.get(name)
    if value is None:
        raise ValueError(
            f"config.json has no entry {name!r}, which this model needs. "
            "Download the file again."
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or value <= 0:
        raise ValueError(
            f"config.json has {name}={value!r}, expected a number above 0. "
            "Download the file again."
        )
    return float(value)
