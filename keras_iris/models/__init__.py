"""The self-play model and its sequence log-probs."""

from keras_iris.models.log_probs import sequence_log_probs
from keras_iris.models.lora import Lora, add_lora
from keras_iris.models.score import TokenScorer, score_pairs
from keras_iris.models.self_play_model import SelfPlayModel

__all__ = [
    "Lora",
    "SelfPlayModel",
    "TokenScorer",
    "add_lora",
    "score_pairs",
    "sequence_log_probs",
]
