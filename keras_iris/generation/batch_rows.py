"""How many prompts are answered together: what a row takes, and what is free.

Counted from the model's sizes, for JAX; `tests/test_run_estimate.py` holds it
against what XLA allocates.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras

from keras_iris.generation.decoder import SHARE_THAT_BEGINS, WAVES
from keras_iris.generation.rowwise import BLOCK, rowwise_parts

# Where nobody tells how much memory is free, as on CPUs.
DEFAULT_ROWS = 32
# With so many, reading the weights is a small part of a step.
MOST_ROWS = 1024
# Of what is free; the rest is for what nobody counts.
FREE_SHARE = 0.8
_FLOAT_BYTES = 4
_ANSWER_BYTES = 8  # a token's id and log-prob
# Attention's products, their exponentials and weights, of which a new token's
# are two; a gate, its activation and what it is multiplied with; logits, their
# exponentials and probabilities.
_SCORE_COPIES, _STEP_COPIES, _INNER_COPIES, _LOGIT_COPIES = 3, 2, 3, 3
_HEADS = ("num_query_heads", "num_attention_heads", "num_heads")
# What KerasHub's backbones call them.
_NAMES = {
    "num_layers": ("num_layers",),
    "num_heads": _HEADS,
    "num_key_value_heads": ("num_key_value_heads", *_HEADS),
    "hidden_size": ("hidden_dim",),
    "vocabulary_size": ("vocabulary_size",),
}


class Sizes(NamedTuple):
    """Numbers of a decoder.

    Attributes:
        num_layers: Decoder layers.
        num_heads: Heads of queries.
        num_key_value_heads: Heads of keys and values.
        head_dim: The width of a head.
        hidden_size: The width of hidden states.
        inner_size: The width of a feed-forward network, of all experts
            together: KerasHub computes all.
        vocabulary_size: Rows of the embedding.
        item_bytes: Bytes of a number that it computes with.
        is_rowwise: Whether a step reads the cache as it is. KerasHub's own
            pass makes another one, and the keys and values of a layer anew
            for every head.
    """

    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    inner_size: int
    vocabulary_size: int
    item_bytes: int
    is_rowwise: bool


def read_sizes(backbone: Any) -> Sizes | None:
    """The sizes of a backbone; `None` if it has others than a decoder's."""
    config = backbone.get_config()
    found = {
        name: next((int(config[n]) for n in names if config.get(n)), 0)
        for name, names in _NAMES.items()
    }
    inner = _inner_size(config)
    if not inner or 0 in found.values():
        return None
    usual = found["hidden_size"] // found["num_heads"]
    return Sizes(
        **found,
        head_dim=int(config.get("head_dim") or usual),
        inner_size=inner,
        item_bytes=float_bytes(backbone.compute_dtype),
        is_rowwise=rowwise_parts(type(backbone)) is not None,
    )


def _inner_size(config: Mapping[str, Any]) -> int:
    usual = int(config.get("intermediate_dim") or 0)
    expert = int(config.get("moe_intermediate_dim") or usual)
    return max(usual, int(config.get("num_experts") or 0) * expert)


def float_bytes(dtype: str) -> int:
    """Bytes of a number of a float type that models are of."""
    return 2 if "16" in dtype else 4


def token_bytes(sizes: Sizes) -> int:
    """Bytes of a token's keys and values."""
    keys = sizes.num_key_value_heads * sizes.head_dim
    return 2 * sizes.num_layers * keys * sizes.item_bytes


def row_bytes(sizes: Sizes, *, prompt_length: float, new_tokens: int) -> float:
    """Bytes that a row takes while its batch is answered, at their most.

    Keys and values, and beside them either attention or logits of a new token,
    or what is computed of prompts as they are read: attention, which isn't
    fused, or the feed-forward network of one layer. Where rows begin on their
    own, an eighth of them does; of few rows more, which isn't counted.

    Args:
        sizes: Of the model.
        prompt_length: Tokens that prompts are padded to.
        new_tokens: The most tokens of an answer.
    """
    total = prompt_length + new_tokens
    step = _FLOAT_BYTES * max(
        _STEP_COPIES * sizes.num_heads * total,
        _LOGIT_COPIES * sizes.vocabulary_size,
    )
    hidden = 2 * sizes.hidden_size * sizes.item_bytes
    scores = _SCORE_COPIES * sizes.num_heads * prompt_length
    inner = _INNER_COPIES * sizes.inner_size
    read = hidden + _FLOAT_BYTES * max(scores, inner)  # of a token
    token = token_bytes(sizes)
    if not sizes.is_rowwise:
        queries = sizes.num_heads * sizes.head_dim
        token = 2 * token + 2 * 2 * queries * sizes.item_bytes
        return max(prompt_length * (token + read), total * token + step)
    beginning = total * token + min(BLOCK, prompt_length) * read
    answers = WAVES * _ANSWER_BYTES * new_tokens
    return total * token + answers + max(beginning * SHARE_THAT_BEGINS, step)


def gathered_bytes(variables: Iterable[Any], item_bytes: int) -> float:
    """Bytes of the weights that a device gets of others to answer prompts.

    Of variables that are cut over the devices of a batch, XLA gathers all
    before the first token, and not layer by layer as in training.

    Args:
        variables: Those of the model.
        item_bytes: Of a number that it computes with.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 0
    mesh, batch = distribution.device_mesh, distribution.batch_dim_name
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    total = 0.0
    for variable in variables:
        layout = distribution.get_variable_layout(variable)
        axes = set(keras.tree.flatten(layout.axes if layout else ()))
        if batch in axes:
            others = math.prod(sizes[axis] for axis in axes - {batch, None})
            size = min(item_bytes, variable.value.dtype.itemsize)
            total += size * math.prod(variable.shape) / others
    return total


def rows_that_fit(bytes_of_row: float, free_bytes: float) -> int:
    """Rows of a device: a power of two, from 1 to `MOST_ROWS`.

    Args:
        bytes_of_row: As `row_bytes` counts them.
        free_bytes: Memory of the device that is free.
    """
    rows = min(int(FREE_SHARE * free_bytes / bytes_of_row), MOST_ROWS)
    return 1 << (max(1, rows).bit_length() - 1)
