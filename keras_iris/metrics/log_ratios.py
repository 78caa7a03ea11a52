"""Means of log-ratios `r = log p_policy - log p_opponent`, in nats."""

import abc
from typing import Any

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric

Tensor = Any


class _MeanOverPairs(PairMetric):
    """The weighted mean over all pairs of a function of their log-ratios."""

    @abc.abstractmethod
    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """Maps two tensors of shape `(batch,)` to one."""

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Sum of weighted values, sum of weights."""
        values = self.values(batch.log_ratio[:, 0], batch.log_ratio[:, 1])
        weight = batch.sample_weight
        return ops.sum(weight * values), ops.sum(weight)


@keras.saving.register_keras_serializable(package="keras_iris")
class RealLogRatio(_MeanOverPairs):
    """Mean `r(y)` of annotated responses, in nats.

    It falls where the likelihood of the data collapses, also while the
    margin grows.
    """

    default_name = "real_log_ratio"

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y)`."""
        return real


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticLogRatio(_MeanOverPairs):
    """Mean `r(y')` of synthetic responses, in nats."""

    default_name = "synthetic_log_ratio"

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y')`."""
        return synthetic


@keras.saving.register_keras_serializable(package="keras_iris")
class Margin(_MeanOverPairs):
    """Mean of `r(y) - r(y')`, in nats."""

    default_name = "margin"

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """`r(y) - r(y')`."""
        return real - synthetic


@keras.saving.register_keras_serializable(package="keras_iris")
class MarginAccuracy(_MeanOverPairs):
    """Share of pairs with `r(y) > r(y')`."""

    default_name = "margin_accuracy"

    def values(self, real: Tensor, synthetic: Tensor) -> Tensor:
        """1 where `r(y) > r(y')`, else 0."""
        return ops.cast(real > synthetic, "float32")
