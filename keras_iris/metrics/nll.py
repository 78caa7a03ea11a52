"""Negative log-likelihoods per token under the policy, in nats."""

from typing import Any

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric

Tensor = Any


def _nats_and_tokens(batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Sums over the batch of annotated and synthetic, each of shape (2,)."""
    weight = batch.sample_weight[:, None]
    nats = -ops.sum(weight * batch.policy, axis=0)
    return nats, ops.sum(weight * batch.num_tokens, axis=0)


@keras.saving.register_keras_serializable(package="keras_iris")
class RealNLL(PairMetric):
    """NLL per token of annotated responses, in nats."""

    default_name = "real_nll"

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Nats and tokens."""
        nats, tokens = _nats_and_tokens(batch)
        return nats[0], tokens[0]


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticNLL(PairMetric):
    """NLL per token of synthetic responses, in nats."""

    default_name = "synthetic_nll"

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Nats and tokens."""
        nats, tokens = _nats_and_tokens(batch)
        return nats[1], tokens[1]


@keras.saving.register_keras_serializable(package="keras_iris")
class NLLGap(PairMetric):
    """NLL per token of annotated minus that of synthetic responses, in nats.

    Cross-entropy minus entropy, of either sign. It falls where the policy
    comes to prefer the data to its earlier samples.
    """

    default_name = "nll_gap"
    shape = (2,)

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Nats and tokens, annotated and synthetic."""
        return _nats_and_tokens(batch)

    def quotient(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """The difference of the two."""
        nll = super().quotient(numerator, denominator)
        return nll[0] - nll[1]
