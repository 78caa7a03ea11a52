"""Losses that layers add, which parts of a batch don't add up to."""

from collections.abc import Sequence
from typing import Any

import keras


def refuse_layer_losses(model: keras.Model, losses: Sequence[Any]) -> None:
    """Refuses losses of layers in a forward pass of part of a batch.

    A router's loss is a product of means over all tokens, and what other
    layers add is as unknown. Weight regularizers don't depend on the batch.

    Args:
        model: The model.
        losses: `model.losses` after the forward pass.

    Raises:
        ValueError: There are others than of weight regularizers.
    """
    regularized = [v for v in model.trainable_weights if v.regularizer]
    if len(losses) > len(regularized):
        raise ValueError(
            "A layer adds a loss of its own (`add_loss`, a router's, an "
            "`activity_regularizer`'s), which depends on the whole batch: "
            "micro-batches would change it. Received: "
            f"{len(losses) - len(regularized)} such losses with "
            f"micro_batch_size={model.micro_batch_size}. Compile with "
            "micro_batch_size=None and a smaller batch."
        )
