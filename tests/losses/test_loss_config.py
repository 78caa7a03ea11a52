"""What losses take, refuse and save."""

import doctest
import sys

import keras
import numpy as np
import pytest

import keras_iris.losses
from keras_iris.losses import (
    IRIS,
    SFT,
    SPACE,
    SPIF,
    SPIN,
    TSPIN,
    Risk,
    SelfPlayLoss,
)

PAIRS = np.array([[-3.0, -2.0], [-4.0, -5.0]], "float32")


@pytest.mark.parametrize(
    "loss",
    [
        IRIS(0.5, sft_weight=0.1, name="a"),
        SPIN(0.3, sft_weight=0.2),
        SPACE(2.0, sft_weight=3.0),
        SPIF(4.0, sft_weight=0.4),
        TSPIN(0.5, 0.2, sft_weight=0.4),
        SFT(name="b"),
    ],
)
def test_config_round_trip(loss):
    config = keras.saving.serialize_keras_object(loss)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(loss)
    assert copy.get_config() == loss.get_config()
    assert float(copy(PAIRS, PAIRS + 1)) == float(loss(PAIRS, PAIRS + 1))


def test_config_of_iris_holds_the_present_order():
    variable = keras.Variable(0.5, trainable=False)
    loss = IRIS(variable)
    variable.assign(1.5)
    expected = {"alpha": 1.5, "name": "iris", "sft_weight": 0.0}
    assert loss.get_config() == expected
    assert IRIS.from_config(loss.get_config()).alpha == 1.5


def test_a_bound_variable_takes_and_sets_the_order():
    variable = keras.Variable(1.0, trainable=False)
    loss = IRIS(0.5)
    policy = PAIRS + [[1.0, 0.0], [0.5, -2.0]]
    at_half = float(loss(PAIRS, policy))
    loss.bind_alpha(variable)
    assert float(variable.value) == 0.5
    assert float(loss(PAIRS, policy)) == pytest.approx(at_half)
    variable.assign(2.0)
    assert float(loss(PAIRS, policy)) == pytest.approx(
        float(IRIS(2.0)(PAIRS, policy))
    )
    loss.bind_alpha(variable)  # once more changes nothing
    assert float(variable.value) == 2.0


def test_other_losses_have_no_order():
    variable = keras.Variable(1.25, trainable=False)
    for loss in (SPIN(), SPACE(), SPIF(), SFT()):
        loss.bind_alpha(variable)
        assert float(variable.value) == 1.25


@pytest.mark.parametrize(
    ("loss", "columns"),
    [
        (IRIS(), [(0,), (1,)]),
        (IRIS(sft_weight=0.1), [(0,), (1,), (0,)]),
        (SPIN(sft_weight=0.1), [(0, 1)]),
        (SPIN(), [(0, 1)]),
        (SPACE(), [(0, 1)]),
        (SPIF(), [(0, 1)]),
        (SFT(), [(0, 1)]),
        (TSPIN(), [(0, 1)]),
    ],
)
def test_passes_over_the_batch(loss, columns):
    log_probs = keras.ops.zeros((4, 2))
    streams = loss.streams(log_probs, log_probs)
    assert [stream.columns for stream in streams] == columns


def test_a_loss_of_ones_own():
    class Hinge(SelfPlayLoss):
        def risks(self, y_true, y_pred):
            log_ratio = y_pred - y_true
            margin = log_ratio[:, 0] - log_ratio[:, 1]
            return [Risk(keras.ops.relu(1.0 - margin), weight=2.0)]

    value = Hinge()(PAIRS, PAIRS + [[1.0, 0.5], [0.0, 0.0]])
    assert float(value) == pytest.approx(2 * (0.5 + 1.0) / 2)


def test_call_is_the_loss_of_equal_weights():
    loss = SPIN()
    assert float(loss.call(PAIRS, PAIRS + 1)) == float(loss(PAIRS, PAIRS + 1))


@pytest.mark.parametrize(
    "alpha", [-0.1, 100.5, np.nan, np.inf, "1", None, [1.0], np.ones(1)]
)
def test_order_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"`alpha` has to be a number in \["):
        IRIS(alpha)


def test_variable_that_is_no_order():
    for value in (-1.0, [0.5, 1.0]):
        with pytest.raises(ValueError, match="scalar Keras variable"):
            IRIS(keras.Variable(value))


@pytest.mark.parametrize("value", [0, -1.0, np.nan, np.inf, "1", None])
@pytest.mark.parametrize(
    ("cls", "name"),
    [(SPIN, "beta"), (SPACE, "mu"), (SPIF, "c"), (TSPIN, "beta")],
)
def test_hyper_parameter_out_of_range(cls, name, value):
    with pytest.raises(ValueError, match=f"`{name}` has to be a positive"):
        cls(value)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf, "1", None])
@pytest.mark.parametrize("cls", [IRIS, SPIN, SPACE, SPIF, TSPIN])
def test_weight_of_the_anchor_out_of_range(cls, value):
    with pytest.raises(ValueError, match=r"`sft_weight` has to be a number in"):
        cls(sft_weight=value)


@pytest.mark.parametrize(
    ("true", "pred"),
    [((4,), (4,)), ((4, 3), (4, 3)), ((4, 2), (4, 1)), ((3, 2), (4, 2))],
)
def test_wrong_shapes(true, pred):
    with pytest.raises(ValueError, match=r"one shape \(batch, 2\).*predict"):
        IRIS()(np.zeros(true), np.zeros(pred))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 2, 1), ()])
def test_wrong_shape_of_weights(shape):
    with pytest.raises(ValueError, match=r"shape \(batch,\), one weight per"):
        IRIS()(PAIRS, PAIRS, np.ones(shape))


def test_examples_of_docstrings():
    num_run = 0
    for name in keras_iris.losses.__all__:
        module = sys.modules[getattr(keras_iris.losses, name).__module__]
        result = doctest.testmod(module)
        assert result.failed == 0
        num_run += result.attempted
    assert num_run > 0
