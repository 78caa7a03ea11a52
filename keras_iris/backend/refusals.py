"""What the train steps of several backends refuse."""

from collections.abc import Sequence
from typing import Any

import keras


def count_layer_losses(
    layer: keras.layers.Layer, losses: Sequence[Any] | None = None
) -> int:
    """How many losses a forward pass added, beside weight regularizers.

    Args:
        layer: A layer or model.
        losses: Its `losses` after the forward pass, where it has them no more.
    """
    losses = layer.losses if losses is None else losses
    return len(losses) - sum(
        bool(v.regularizer) for v in layer.trainable_weights
    )


def refuse_layer_losses(
    model: keras.Model, losses: Sequence[Any] | None = None
) -> None:
    """Refuses losses of layers in a forward pass of part of a batch.

    What it has to do with the whole batch's is unknown, but for KerasHub's
    routers (`keras_iris.backend.routers`). Weight regularizers don't depend on
    the batch.

    Args:
        model: The model.
        losses: As in `count_layer_losses`.

    Raises:
        ValueError: There are some.
    """
    if number := count_layer_losses(model, losses):
        raise ValueError(
            "A layer adds a loss of its own (`add_loss`, an "
            "`activity_regularizer`), which depends on the whole batch: "
            f"micro-batches would change it. Received: {number} such losses "
            f"with micro_batch_size={model.micro_batch_size}. Compile with "
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


def refuse_sharded_checkpoints() -> None:
    """Refuses a checkpoint that was written under a distribution.

    Raises:
        ValueError: Always, on backends other than JAX.
    """
    raise ValueError(
        "Checkpoints of a run under a distribution are read on JAX. Export "
        "its model there with `keras_iris.export`."
    )
