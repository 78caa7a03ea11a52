"""What a step has one of: the order, the gap, the norm of the gradient."""

from typing import Any

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric

Tensor = Any


class _Latest(PairMetric):
    """The value at the latest batch."""

    def update_state(self, batch: PairBatch) -> None:
        """Takes the batch in the place of all before."""
        self.reset_state()
        super().update_state(batch)


@keras.saving.register_keras_serializable(package="keras_iris")
class Alpha(_Latest):
    """The order alpha at the latest batch."""

    default_name = "alpha"

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The order, and 1."""
        return batch.alpha, ops.ones(())


@keras.saving.register_keras_serializable(package="keras_iris")
class Gap(_Latest):
    """The estimated gap between data and opponent at the latest batch.

    A lower bound of the Rényi divergence of order 2, in nats, that
    `AlphaScheduler` keeps in `model.gap`; 0 without it.
    """

    default_name = "gap"

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The gap, and 1."""
        return batch.gap, ops.ones(())


@keras.saving.register_keras_serializable(package="keras_iris")
class GradientNorm(_Latest):
    """The norm of the gradient in all trainable variables at the latest step.

    It is that of the whole batch, before any clipping; 0 in `evaluate`.
    """

    default_name = "gradient_norm"

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The norm, and 1."""
        return batch.gradient_norm, ops.ones(())
