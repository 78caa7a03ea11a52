"""The estimate of a divergence that the IRIS loss makes."""

from typing import Any

import keras

from keras_iris.losses import tilted_risk
from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import BatchMetric

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class Divergence(BatchMetric):
    """Minus the IRIS loss: the variational Rényi estimate, in nats.

    At its largest over all policies it is `D_alpha(p_data || p_opponent) /
    alpha`, up to the error of estimating it from a batch. It is 0 where
    policy and opponent are equal.

    Reference:
        Birrell et al., arXiv 2007.03814.
    """

    default_name = "divergence"

    def batch_value(self, batch: PairBatch) -> Tensor:
        """Minus the two tilted risks."""
        real, synthetic = batch.log_ratio[:, 0], batch.log_ratio[:, 1]
        weight, alpha = batch.sample_weight, batch.alpha
        return -(
            tilted_risk(-real, 1.0 - alpha, weight)
            + tilted_risk(synthetic, alpha, weight)
        )
