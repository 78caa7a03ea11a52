"""Nothing holds the activations of more than a micro-batch."""

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris

PAIRS, OPPONENT = make_pairs(10), np.full((10, 2), -20.0, "float32")


class Rows:
    """Notes how many responses go through a backbone at once."""

    def __init__(self, backbone):
        self.largest = 0
        self._call = backbone.call
        backbone.call = self

    def __call__(self, inputs, *args, **kwargs):
        self.largest = max(self.largest, inputs["token_ids"].shape[0])
        return self._call(inputs, *args, **kwargs)


def _model(micro_batch_size):
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(
        keras.optimizers.SGD(0.01),
        keras_iris.losses.IRIS(1.5),
        metrics=["mse", keras_iris.metrics.Margin()],
        micro_batch_size=micro_batch_size,
    )
    return model


@pytest.mark.parametrize("size", [1, 3])
def test_of_fit_evaluate_and_predict(size):
    model = _model(size)
    rows = Rows(model.causal_lm.backbone)
    for call in (
        lambda: model.fit(PAIRS, OPPONENT, batch_size=10, verbose=0),
        lambda: model.evaluate(PAIRS, OPPONENT, batch_size=10, verbose=0),
        lambda: model.predict(PAIRS, batch_size=10, verbose=0),
        lambda: model.test_on_batch(PAIRS, OPPONENT),
        lambda: model.predict_on_batch(PAIRS),
    ):
        rows.largest = 0
        call()
        assert rows.largest == 2 * size


def test_values_are_those_of_the_whole_batch():
    options = {"batch_size": 10, "verbose": 0}
    whole, parts = _model(None), _model(3)
    np.testing.assert_allclose(
        parts.predict(PAIRS, **options),
        whole.predict(PAIRS, **options),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        parts.evaluate(PAIRS, OPPONENT, **options),
        whole.evaluate(PAIRS, OPPONENT, **options),
        rtol=1e-4,
    )
