"""Answers of a model to prompts: token ids in, token ids out."""

from keras_iris.generation.engine import Completion, Engine
from keras_iris.generation.keras_engine import KerasEngine

__all__ = [
    "Completion",
    "Engine",
    "KerasEngine",
]
