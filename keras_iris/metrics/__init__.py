"""Monitoring values of self-play, as Keras metrics."""

import keras

from keras_iris.metrics.alpha import Alpha, AlphaMetric
from keras_iris.metrics.divergence import Divergence
from keras_iris.metrics.effective_sample_size import (
    RealEffectiveSampleSize,
    SyntheticEffectiveSampleSize,
)
from keras_iris.metrics.log_ratios import (
    Margin,
    MarginAccuracy,
    RealLogRatio,
    SyntheticLogRatio,
)
from keras_iris.metrics.nll import Gap, RealNLL, SyntheticNLL, TokenMetric
from keras_iris.metrics.recent import PairBatch, RecentLogProbs
from keras_iris.metrics.summary import (
    divergence,
    effective_sample_size,
    summary,
    token_gap,
)

__all__ = [
    "Alpha",
    "AlphaMetric",
    "Divergence",
    "Gap",
    "Margin",
    "MarginAccuracy",
    "PairBatch",
    "RealEffectiveSampleSize",
    "RealLogRatio",
    "RealNLL",
    "RecentLogProbs",
    "SyntheticEffectiveSampleSize",
    "SyntheticLogRatio",
    "SyntheticNLL",
    "TokenMetric",
    "divergence",
    "effective_sample_size",
    "self_play_metrics",
    "summary",
    "token_gap",
]


def self_play_metrics() -> list[keras.metrics.Metric]:
    """A new instance of every metric.

    Returns:
        A list, for the argument `metrics` of `SelfPlayModel.compile`.
    """
    return [
        RealLogRatio(),
        SyntheticLogRatio(),
        Margin(),
        MarginAccuracy(),
        RealEffectiveSampleSize(),
        SyntheticEffectiveSampleSize(),
        Divergence(),
        RealNLL(),
        SyntheticNLL(),
        Gap(),
        Alpha(),
    ]
