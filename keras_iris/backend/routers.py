"""The losses of KerasHub's routers of experts, over the parts of a batch.

Each router adds `coefficient * experts * sum(f * P)` to the loss: `f` is the
share of tokens that go to an expert, `P` the mean probability that the router
gives it, both over all tokens of the batch. Of a part of the batch that would
be another number, so in parts the routers add the sums that `f` and `P` are
made of instead, and the loss is made of the sums of all parts.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import keras
from keras import ops

Tensor = Any

# What the layers of KerasHub (0.32) call, in each module of them.
_FUNCTION = "compute_load_balancing_loss"


def _layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers out of modules that compute a router's loss."""
    return [
        layer
        for layer in model._flatten_layers()
        if hasattr(sys.modules[type(layer).__module__], _FUNCTION)
    ]


def silence_routers(model: keras.Model) -> None:
    """Takes their losses away from a model's routers, for good."""
    for layer in _layers(model):
        layer.add_loss = _add_nothing


def _add_nothing(loss: Tensor) -> None:
    """In place of a layer's `add_loss`."""


def has_routers(model: keras.Model) -> bool:
    """Whether a model has layers that may add a router's loss."""
    return any(x.add_loss is not _add_nothing for x in _layers(model))


@contextlib.contextmanager
def router_sums(model: keras.Model, row_weights: Tensor) -> Iterator[None]:
    """Lets routers add the sums of their losses, `coefficient * sums`.

    Args:
        model: The model.
        row_weights: Tensor of shape `(rows, responses)`: 1, or 0 for what
            only fills the part up.
    """
    row_weights = ops.reshape(row_weights, (-1, 1))

    def sums(
        router_logits: Tensor,
        num_experts: int,
        top_k: int,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        probabilities = ops.softmax(router_logits, axis=-1)
        _, chosen = ops.top_k(probabilities, k=top_k)
        frequencies = ops.mean(ops.one_hot(chosen, num_experts), axis=1)
        if attention_mask is None:
            num_tokens, num_rows = router_logits.shape[0], row_weights.shape[0]
            attention_mask = ops.ones((num_rows, num_tokens // num_rows))
        if len(attention_mask.shape) == 3:  # (rows, queries, keys)
            attention_mask = ops.any(attention_mask, axis=-1)
        weights = ops.cast(attention_mask, "float32") * row_weights
        weights = ops.reshape(weights, (-1, 1))
        return ops.concatenate(
            [
                ops.sum(weights * ops.cast(part, "float32"), axis=0)
                for part in (frequencies, probabilities, ops.ones_like(weights))
            ]
            + [ops.ones(1)]
        )

    modules = list({sys.modules[type(x).__module__] for x in _layers(model)})
    originals = [getattr(module, _FUNCTION) for module in modules]
    for module in modules:
        setattr(module, _FUNCTION, sums)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, _FUNCTION, original)


def split_sums(losses: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Tells the sums of the routers from other losses of layers.

    Args:
        losses: What layers added within `router_sums`.

    Returns:
        The sums, of shape `(routers, 2 * experts + 2)`, and the others.
    """
    sums = [loss for loss in losses if len(loss.shape) == 1]
    others = [loss for loss in losses if len(loss.shape) != 1]
    return ops.stack(sums) if sums else ops.zeros((0, 2)), others


def router_loss(sums: Tensor, num_parts: Any) -> Tensor:
    """The loss of all routers over the whole batch, a float32 scalar.

    Args:
        sums: What `split_sums` gives, added up over the parts.
        num_parts: Number of the parts.
    """
    num_experts = (sums.shape[1] - 2) // 2
    total = sums[:, -2:-1]
    means = sums[:, :-2] / ops.where(total == 0, 1.0, total)
    products = means[:, :num_experts] * means[:, num_experts:]
    coefficients = sums[:, -1] / ops.cast(num_parts, "float32")
    return num_experts * ops.sum(coefficients * ops.sum(products, axis=1))
