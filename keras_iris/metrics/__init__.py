"""Monitoring values of self-play, as Keras metrics."""

from keras_iris.metrics.divergence import Divergence
from keras_iris.metrics.effective_sample_size import (
    RealEffectiveSampleSize,
    SyntheticEffectiveSampleSize,
    effective_sample_size,
)
from keras_iris.metrics.example_score import (
    ExampleScore,
    interval_of_difference,
)
from keras_iris.metrics.log_ratios import (
    Margin,
    MarginAccuracy,
    RealLogRatio,
    SyntheticLogRatio,
)
from keras_iris.metrics.monitor import self_play_metrics
from keras_iris.metrics.nll import NLLGap, RealNLL, SyntheticNLL
from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric
from keras_iris.metrics.score_mode import score_mode
from keras_iris.metrics.step import Alpha, Gap, GradientNorm

__all__ = [
    "Alpha",
    "Divergence",
    "ExampleScore",
    "Gap",
    "GradientNorm",
    "Margin",
    "MarginAccuracy",
    "NLLGap",
    "PairBatch",
    "PairMetric",
    "RealEffectiveSampleSize",
    "RealLogRatio",
    "RealNLL",
    "SyntheticEffectiveSampleSize",
    "SyntheticLogRatio",
    "SyntheticNLL",
    "effective_sample_size",
    "interval_of_difference",
    "score_mode",
    "self_play_metrics",
]
