"""What the train steps of several backends refuse."""

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


def refuse_distribution() -> None:
    """Refuses a current `keras.distribution` over several devices.

    Raises:
        ValueError: There is one, which Keras heeds on JAX only.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.device_mesh.devices.size == 1:
        return
    raise ValueError(
        f"{type(distribution).__name__} needs JAX: on "
        f"{keras.backend.backend()!r} one device would train on all. Set "
        "KERAS_BACKEND=jax, or call keras.distribution.set_distribution(None)."
    )
