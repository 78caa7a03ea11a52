"""The estimate of a divergence that the IRIS loss makes."""

from typing import Any

import keras

from keras_iris.losses import tilted_risk
from keras_iris.metrics.alpha import BatchAlphaMetric

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class Divergence(BatchAlphaMetric):
    """Minus the IRIS loss: the variational Rényi estimate, in nats.

    At its largest over all policies it is `D_alpha(p_data || p_opponent) /
    alpha`, up to the error of estimating it from a batch. It is 0 where
    policy and opponent are equal.

    Args:
        alpha: The order: a number or a scalar Keras variable.
            `SelfPlayModel.compile` replaces it by `model.alpha`.
        name: Name of the metric.
        dtype: Type of the metric's variables.

    Reference:
        Birrell et al., arXiv 2007.03814.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str = "divergence",
        dtype: Any = None,
    ) -> None:
        super().__init__(alpha, name=name, dtype=dtype)

    def batch_value(
        self, log_ratio: Tensor, alpha: Tensor, sample_weight: Tensor
    ) -> Tensor:
        """Minus the two tilted risks."""
        real, synthetic = log_ratio[:, 0], log_ratio[:, 1]
        return -(
            tilted_risk(-real, 1.0 - alpha, sample_weight)
            + tilted_risk(synthetic, alpha, sample_weight)
        )
