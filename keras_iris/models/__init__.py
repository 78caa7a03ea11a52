"""The self-play model and its sequence log-probs."""

from keras_iris.models.log_probs import sequence_log_probs
from keras_iris.models.lora import Lora, add_lora
from keras_iris.models.self_play_model import SelfPlayModel

__all__ = [
    "Lora",
    "SelfPlayModel",
    "add_lora",
    "sequence_log_probs",
]
