"""How many examples of a batch the importance weights leave."""

from typing import Any

import keras
from keras import ops

from keras_iris.losses import tilted_weights
from keras_iris.metrics.alpha import BatchAlphaMetric

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class RealEffectiveSampleSize(BatchAlphaMetric):
    """Effective sample size of the weights of annotated responses.

    With `w ~ exp((alpha - 1) r(y))` over the batch, `1 / sum w^2` as a share
    of the batch: 1 for uniform weights, `1 / batch` where one example has all
    (Kish, "Survey Sampling", 1965). Rows of weight 0 are not of the batch.

    Args:
        alpha: The order: a number or a scalar Keras variable.
            `SelfPlayModel.compile` replaces it by `model.alpha`.
        name: Name of the metric.
        dtype: Type of the metric's variables.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str = "real_ess",
        dtype: Any = None,
    ) -> None:
        super().__init__(alpha, name=name, dtype=dtype)

    def batch_value(
        self, log_ratio: Tensor, alpha: Tensor, sample_weight: Tensor
    ) -> Tensor:
        """A number in (0, 1]."""
        return _share(log_ratio[:, 0], alpha - 1.0, sample_weight)


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticEffectiveSampleSize(BatchAlphaMetric):
    """Effective sample size of the weights of synthetic responses.

    As `RealEffectiveSampleSize`, with `w ~ exp(alpha r(y'))`.

    Args:
        alpha: The order: a number or a scalar Keras variable.
            `SelfPlayModel.compile` replaces it by `model.alpha`.
        name: Name of the metric.
        dtype: Type of the metric's variables.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str = "synthetic_ess",
        dtype: Any = None,
    ) -> None:
        super().__init__(alpha, name=name, dtype=dtype)

    def batch_value(
        self, log_ratio: Tensor, alpha: Tensor, sample_weight: Tensor
    ) -> Tensor:
        """A number in (0, 1]."""
        return _share(log_ratio[:, 1], alpha, sample_weight)


def _share(values: Tensor, tilt: Tensor, sample_weight: Tensor) -> Tensor:
    """`1 / sum w^2` of tilted weights, divided by the number of rows."""
    weights = tilted_weights(values, tilt, sample_weight)
    num_rows = ops.sum(ops.cast(sample_weight > 0, weights.dtype))
    return ops.divide_no_nan(1.0, num_rows * ops.sum(ops.square(weights)))
