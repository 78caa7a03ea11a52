"""Answers of a model to prompts: token ids in, token ids out."""

from keras_iris.generation.check_log_probs import check_log_probs
from keras_iris.generation.engine import Completion, Engine
from keras_iris.generation.keras_engine import KerasEngine
from keras_iris.generation.server_engine import ServerEngine

__all__ = [
    "Completion",
    "Engine",
    "KerasEngine",
    "ServerEngine",
    "check_log_probs",
]
