"""Self-play fine-tuning of language models in Keras 3."""

from keras_iris import callbacks
from keras_iris import data

from keras_iris import generation
from keras_iris import losses
from keras_iris import metrics
from keras_iris import models
from keras_iris.models import SelfPlayModel
from keras_iris.self_play import SelfPlay

__version__ = "0.1.0"

__all__ = [
    "SelfPlay",
    "SelfPlayModel",
    "callbacks",
    "data",
    "evaluation",
    "generation",
    "losses",
    "metrics",
    "models",
]
