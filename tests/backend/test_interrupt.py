"""Interrupts inside a step, and what `fit` leaves for the next."""

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.models.lora import Lora, add_lora

PAIRS, OPPONENT = make_pairs(), np.full((8, 2), -20.0, "float32")
is_jax = keras.backend.backend() == "jax"


class Interrupted(keras.optimizers.SGD):
    """Is interrupted inside a step, once."""

    is_due = False

    def apply(self, *args, **kwargs):
        if self.is_due:
            self.is_due = False
            raise KeyboardInterrupt
        return super().apply(*args, **kwargs)


def _model(optimizer, *, lora=None, **options):
    causal_lm = make_causal_lm(num_layers=1)
    if lora is not None:
        add_lora(causal_lm.backbone, lora)
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(optimizer, keras_iris.losses.IRIS(), **options)
    return model


def _fit(model, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(PAIRS, OPPONENT, **options)


def _weights(model):
    return [v.numpy() for v in model.trainable_variables]


@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch_size": 1}, {"micro_batch_size": 1, "lora": Lora(2)}],
    ids=["whole", "parts", "adapters"],
)
@pytest.mark.parametrize("is_trained_before", [False, True])
def test_an_interrupted_first_step(options, is_trained_before):
    optimizer = Interrupted(0.01)
    model = _model(optimizer, **options)
    if is_trained_before:
        _fit(model)
        model.train_function = None  # as another batch's shape would
    before = _weights(model)
    optimizer.is_due = True
    with pytest.raises(KeyboardInterrupt):
        _fit(model)
    for value, expected in zip(_weights(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    _fit(model)
    changed = zip(_weights(model), before, strict=True)
    assert any(not np.array_equal(*pair) for pair in changed)
    model.predict(PAIRS, verbose=0)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_interrupted_evaluation(method):
    model = _model("sgd")
    before = _weights(model)

    class Stop(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

        on_predict_batch_end = on_test_batch_end

    arguments = (PAIRS, OPPONENT) if method == "evaluate" else (PAIRS,)
    with pytest.raises(KeyboardInterrupt):
        getattr(model, method)(*arguments, callbacks=[Stop()], verbose=0)
    for value, expected in zip(_weights(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    _fit(model)


@pytest.mark.skipif(not is_jax, reason="others have no donated buffers")
def test_a_step_that_took_the_weights():
    model = _model("sgd")
    model.make_train_function()
    function = model.train_function

    def interrupted(state, iterator):
        function(state, iterator)
        raise KeyboardInterrupt  # before the new state is anywhere

    model.train_function = interrupted
    with pytest.raises(KeyboardInterrupt):
        _fit(model)
    for method in (_fit, lambda model: model.predict(PAIRS)):
        with pytest.raises(RuntimeError, match="Load the model.* again"):
            method(model)


def _ema(**options):
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9, **options)


def test_a_second_fit_with_moving_averages():
    model = _model(_ema())
    for _ in range(2):
        _fit(model)
        averages = model.optimizer._model_variables_moving_average
        for value, average in zip(_weights(model), averages, strict=True):
            np.testing.assert_array_equal(value, average.numpy())


def test_a_fit_in_two_parts():
    """With the moving average, which the end of `fit` makes the weights."""
    whole, parts = _model(_ema()), _model(_ema())
    _fit(whole, epochs=2)
    with parts.finalizing_if(lambda: False):
        _fit(parts)
    before = _weights(parts)
    average = parts.optimizer._model_variables_moving_average[0].numpy()
    assert not np.array_equal(before[0], average)
    _fit(parts)
    for value, expected in zip(_weights(parts), _weights(whole), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
