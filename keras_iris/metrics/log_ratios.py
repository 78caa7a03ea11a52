"""Means of log-ratios `r = log p_policy - log p_opponent`, in nats.

All take `y_true`, the opponent's, and `y_pred`, the policy's log-probs, of
shape `(batch, 2)`: annotated and synthetic response.
"""

import abc
from typing import Any

import keras
from keras import ops

Tensor = Any


class _MeanOverPairs(keras.metrics.Mean, abc.ABC):
    """The weighted mean over all pairs of a function of their log-ratios."""

    @abc.abstractmethod
    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Maps two tensors of shape `(batch,)` to one."""

    def update_state(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> None:
        """Adds a batch."""
        log_ratio = ops.cast(y_pred, "float32") - ops.cast(y_true, "float32")
        values = self.values(log_ratio[:, 0], log_ratio[:, 1])
        if sample_weight is not None:
            sample_weight = ops.reshape(sample_weight, (-1,))
            # Keras' mean multiplies: a row of weight 0 may hold a NaN.
            values = ops.where(sample_weight > 0, values, 0.0)
        super().update_state(values, sample_weight)


@keras.saving.register_keras_serializable(package="keras_iris")
class RealLogRatio(_MeanOverPairs):
    """Mean `r(y)` of annotated responses, in nats.

    It falls where the likelihood of the data collapses, also while the
    margin grows.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "real_log_ratio", dtype: Any = None):
        super().__init__(name=name, dtype=dtype)

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y)`."""
        return real


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticLogRatio(_MeanOverPairs):
    """Mean `r(y')` of synthetic responses, in nats.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "synthetic_log_ratio", dtype: Any = None):
        super().__init__(name=name, dtype=dtype)

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y')`."""
        return synthetic


@keras.saving.register_keras_serializable(package="keras_iris")
class Margin(_MeanOverPairs):
    """Mean of `r(y) - r(y')`, in nats.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "margin", dtype: Any = None):
        super().__init__(name=name, dtype=dtype)

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y) - r(y')`."""
        return real - synthetic


@keras.saving.register_keras_serializable(package="keras_iris")
class MarginAccuracy(_MeanOverPairs):
    """Share of pairs with `r(y) > r(y')`.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "margin_accuracy", dtype: Any = None):
        super().__init__(name=name, dtype=dtype)

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """1 where `r(y) > r(y')`, else 0."""
        return ops.cast(real > synthetic, "float32")
