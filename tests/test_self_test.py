"""`keras-iris doctor` on every backend: right steps and wrong ones."""

import keras
import pytest

from keras_iris.cli.self_test import self_test


def test_training_is_numpys():
    found = self_test()
    assert found["problems"] == []
    assert found["loss"] == pytest.approx(found["numpy_loss"], rel=1e-5)
    assert found["gradient_error"] < 1e-4


def test_a_wrong_gradient_is_seen(monkeypatch):
    class Wrong(keras.optimizers.SGD):
        def __init__(self, learning_rate):
            super().__init__(1.1 * learning_rate)

    monkeypatch.setattr(keras.optimizers, "SGD", Wrong)
    (problem,) = self_test()["problems"]
    assert "differs from NumPy's" in problem
