"""Callbacks for `SelfPlayModel.fit` and `SelfPlay`."""

from keras_iris.callbacks.alpha_schedule import AlphaSchedule
from keras_iris.callbacks.alpha_scheduler import AlphaScheduler
from keras_iris.callbacks.gap import GapEstimator, RenyiGap
from keras_iris.callbacks.self_play_callback import SelfPlayCallback

__all__ = [
    "AlphaSchedule",
    "AlphaScheduler",
    "GapEstimator",
    "RenyiGap",
    "SelfPlayCallback",
]
