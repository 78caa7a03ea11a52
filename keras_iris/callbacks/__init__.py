"""Callbacks for `SelfPlayModel.fit`."""

from keras_iris.callbacks.alpha_schedule import AlphaSchedule
from keras_iris.callbacks.alpha_scheduler import AlphaScheduler
from keras_iris.callbacks.gap_estimators import DivergenceGap
from keras_iris.callbacks.gap_estimators import GapEstimator
from keras_iris.callbacks.gap_estimators import MarginGap
from keras_iris.callbacks.gap_estimators import TokenGap

__all__ = [
    "AlphaSchedule",
    "AlphaScheduler",
    "DivergenceGap",
    "GapEstimator",
    "MarginGap",
    "TokenGap",
]
