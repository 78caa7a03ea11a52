"""The loop: generate, score, fit, next iteration."""

from keras_iris.self_play.loop import SelfPlay

__all__ = ["SelfPlay"]
