"""Estimates of the gap between the model and the data."""

from typing import Protocol, runtime_checkable

import numpy as np

from keras_iris.metrics import PairBatch, step_values


@runtime_checkable
class GapEstimator(Protocol):
    """Estimates, from one batch, how far the model is from the data.

    Attributes:
        starts_at_zero: Whether the estimate is 0 when an iteration starts,
            where policy and opponent are equal. Then it is judged against
            the largest value so far instead of the first.
    """

    starts_at_zero: bool

    def __call__(self, batch: PairBatch, alpha: float) -> float:
        """The estimate: larger means further apart, 0 no gap."""
        ...


class TokenGap:
    """NLL per token of annotated minus synthetic responses, in nats.

    Under the policy. It is 0 where the model finds the data as likely as its
    own samples; memorised data make it negative, which counts as no gap.
    """

    starts_at_zero = False

    def __call__(self, batch: PairBatch, alpha: float) -> float:
        """The gap of a batch."""
        return step_values(batch, 1.0, 0.0)["nll_gap"]


class MarginGap:
    """Mean of `r(annotated) - r(synthetic)`, in nats."""

    starts_at_zero = True

    def __call__(self, batch: PairBatch, alpha: float) -> float:
        """The gap of a batch."""
        margin = batch.log_ratio[:, 0] - batch.log_ratio[:, 1]
        return float(np.average(margin, weights=batch.sample_weight))


class DivergenceGap:
    """The variational Rényi estimate: minus the IRIS loss, in nats.

    Reference: Birrell et al., arXiv 2007.03814.
    """

    starts_at_zero = True

    def __call__(self, batch: PairBatch, alpha: float) -> float:
        """The gap of a batch."""
        return step_values(batch, alpha, 0.0)["divergence"]
