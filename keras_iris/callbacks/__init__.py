"""Callbacks for `SelfPlayModel.fit`."""

from keras_iris.callbacks.alpha_schedule import AlphaSchedule
from keras_iris.callbacks.alpha_scheduler import AlphaScheduler
from keras_iris.callbacks.gap_estimators import (
    DivergenceGap,
    GapEstimator,
    MarginGap,
    TokenGap,
)

__all__ = [
    "AlphaSchedule",
    "AlphaScheduler",
    "DivergenceGap",
    "GapEstimator",
    "MarginGap",
    "TokenGap",
]
