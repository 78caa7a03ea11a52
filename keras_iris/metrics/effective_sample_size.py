"""How many examples of a batch the importance weights leave."""

from typing import Any

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import BatchMetric

Tensor = Any


def effective_sample_size(
    values: Tensor, tilt: Tensor | float, sample_weight: Tensor | None = None
) -> Tensor:
    """Effective sample size of tilted weights, as a share of the batch.

    With `w_i` proportional to `sample_weight_i * exp(tilt * values_i)` it is
    `(sum w)^2 / (n * sum w^2)`: 1 for uniform weights, `1 / n` where one
    example has all. Rows of weight 0 are not of the batch.

    Args:
        values: Per-example values, shape `(n,)`.
        tilt: The tilt, of any shape.
        sample_weight: Weights of shape `(n,)`, or None for ones.

    Returns:
        Float32 tensor of the shape of `tilt`, in (0, 1]; 0 where all weights
        are.

    Reference:
        Kish, "Survey Sampling", 1965.
    """
    values = ops.cast(ops.convert_to_tensor(values), "float32")
    tilt = ops.cast(ops.convert_to_tensor(tilt), "float32")
    if sample_weight is None:
        weight = ops.ones_like(values)
    else:
        weight = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
    is_row = weight > 0
    z = tilt[..., None] * ops.where(is_row, values, 0.0)  # (..., n)
    z = ops.where(is_row, z, -float("inf"))
    largest = ops.max(z, axis=-1, keepdims=True)
    weights = ops.where(is_row, weight * ops.exp(z - largest), 0.0)
    num_rows = ops.sum(ops.cast(is_row, "float32"))
    return ops.divide_no_nan(
        ops.square(ops.sum(weights, axis=-1)),
        num_rows * ops.sum(ops.square(weights), axis=-1),
    )


@keras.saving.register_keras_serializable(package="keras_iris")
class RealEffectiveSampleSize(BatchMetric):
    """Effective sample size of the weights of annotated responses.

    Those are `w ~ exp((alpha - 1) r(y))` over the batch.
    """

    default_name = "real_ess"

    def batch_value(self, batch: PairBatch) -> Tensor:
        """A number in (0, 1]."""
        return effective_sample_size(
            batch.log_ratio[:, 0], batch.alpha - 1.0, batch.sample_weight
        )


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticEffectiveSampleSize(BatchMetric):
    """Effective sample size of the weights of synthetic responses.

    Those are `w ~ exp(alpha r(y'))` over the batch.
    """

    default_name = "synthetic_ess"

    def batch_value(self, batch: PairBatch) -> Tensor:
        """A number in (0, 1]."""
        return effective_sample_size(
            batch.log_ratio[:, 1], batch.alpha, batch.sample_weight
        )
