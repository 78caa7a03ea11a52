"""Benchmarks of the LM Evaluation Harness (`pip install "keras_iris[eval]"`).

Nothing else of the package imports this folder, or the harness.
"""

from keras_iris.lm_eval.harness import TEN, KerasLM, evaluate

__all__ = ["TEN", "KerasLM", "evaluate"]
