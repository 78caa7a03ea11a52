"""Negative log-likelihoods per token under the policy, in nats."""

from typing import Any

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric

Tensor = Any


class _NLL(PairMetric):
    """NLL per token of annotated and of synthetic responses."""

    shape = (2,)

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Nats and tokens, annotated and synthetic."""
        weight = batch.sample_weight[:, None]
        nats = -ops.sum(weight * batch.policy, axis=0)
        return nats, ops.sum(weight * batch.num_tokens, axis=0)


@keras.saving.register_keras_serializable(package="keras_iris")
class RealNLL(_NLL):
    """NLL per token of annotated responses, in nats."""

    default_name = "real_nll"

    def quotient(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """That of annotated responses."""
        return super().quotient(numerator, denominator)[0]


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticNLL(_NLL):
    """NLL per token of synthetic responses, in nats."""

    default_name = "synthetic_nll"

    def quotient(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """That of synthetic responses."""
        return super().quotient(numerator, denominator)[1]


@keras.saving.register_keras_serializable(package="keras_iris")
class NLLGap(_NLL):
    """NLL per token of annotated minus that of synthetic responses, in nats.

    Cross-entropy minus entropy, of either sign. It falls where the policy
    comes to prefer the data to its earlier samples.
    """

    default_name = "nll_gap"

    def quotient(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """The difference of the two."""
        nll = super().quotient(numerator, denominator)
        return nll[0] - nll[1]
