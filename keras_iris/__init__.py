"""Self-play fine-tuning of language models in Keras 3."""

from keras_iris import (
    callbacks,
    data,
    distribution,
    evaluation,
    generation,
    hub,
    losses,
    metrics,
    models,
)
from keras_iris.hub import export, load
from keras_iris.models import SelfPlayModel
from keras_iris.run_estimate import estimate
from keras_iris.self_play import SelfPlay

__version__ = "0.1.0"

__all__ = [
    "SelfPlay",
    "SelfPlayModel",
    "callbacks",
    "data",
    "distribution",
    "estimate",
    "evaluation",
    "export",
    "generation",
    "hub",
    "load",
    "losses",
    "metrics",
    "models",
]
