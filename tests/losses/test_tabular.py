"""Exact self-play of a categorical "language model": no sampling.

Its one response is one of 50 symbols, and every mean over responses is an
expectation: a tilted risk with the probabilities as weights.
"""

import keras
import numpy as np
import oracles
import pytest
from backend_helpers import gradient, precision
from keras import ops

from keras_iris.callbacks import AlphaScheduler
from keras_iris.callbacks.gap import gap_of_moments
from keras_iris.losses import IRIS, tilted_risk
from keras_iris.metrics import PairBatch

NUM_SYMBOLS = 50
ALPHAS = [0.25, 0.5, 0.75, 1, 1.5, 2, 3]
TOLERANCE = 1e-6
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


@pytest.fixture(autouse=True)
def _float64():
    with precision("float64"):
        yield


def _softmax(logits):
    p = np.exp(logits - logits.max())
    return p / p.sum()


def _logits(seed):
    return np.random.default_rng(seed).normal(size=NUM_SYMBOLS)


def _loss(alpha, log_policy, p_old, p_data):
    """The IRIS loss with exact expectations."""
    log_old = ops.convert_to_tensor(np.log(p_old))
    y_true = ops.stack([log_old] * 2, axis=1)
    y_pred = ops.stack([ops.convert_to_tensor(log_policy)] * 2, axis=1)
    real, synthetic = IRIS(alpha).risks(y_true, y_pred)
    return tilted_risk(real.values, real.tilt, p_data) + tilted_risk(
        synthetic.values, synthetic.tilt, p_old
    )


def _gradient(alpha, logits, p_old, p_data):
    return gradient(
        lambda x: _loss(alpha, ops.log_softmax(x), p_old, p_data), logits
    )


def _descend(alpha, logits, p_old, p_data):
    """A step of gradient descent, in the metric of Fisher information."""
    slope = _gradient(alpha, logits, p_old, p_data)
    # Which is diagonal in logits, but for a shift of all of them.
    return logits - 0.8 * np.clip(slope / _softmax(logits), -1, 1)


def _kl(p, q):
    return oracles.renyi_divergence(p, q, 1)


@each_alpha
def test_the_data_are_a_fixed_point(alpha):
    logits = _logits(0)
    p = _softmax(logits)
    slope = _gradient(alpha, logits, p, p)
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    assert float(_loss(alpha, np.log(p), p, p)) == pytest.approx(0, abs=1e-12)


@each_alpha
def test_the_minimum_is_the_divergence(alpha):
    logits = _logits(0)
    p_data, p_old = _softmax(logits), _softmax(_logits(1))
    minimum = float(_loss(alpha, np.log(p_data), p_old, p_data))
    divergence = oracles.renyi_divergence(p_data, p_old, alpha)
    assert minimum == pytest.approx(-divergence / alpha, abs=TOLERANCE)
    slope = _gradient(alpha, logits, p_old, p_data)
    np.testing.assert_allclose(slope, 0.0, atol=1e-12)
    rng = np.random.default_rng(2)
    for scale in (1e-3, 0.1, 1.0, 10.0):
        for _ in range(5):
            other = np.log(p_data) + scale * rng.normal(size=NUM_SYMBOLS)
            assert float(_loss(alpha, other, p_old, p_data)) > minimum


def test_at_equal_models_every_order_has_the_gradient_of_sft():
    logits = _logits(1)
    p_data, p_old = _softmax(_logits(0)), _softmax(logits)
    for alpha in ALPHAS:
        slope = _gradient(alpha, logits, p_old, p_data)
        np.testing.assert_allclose(slope, p_old - p_data, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
def test_iterated_self_play_finds_the_data(alpha):
    p_data, logits = _softmax(_logits(0)), _logits(1)
    divergences = [_kl(p_data, _softmax(logits))]
    for _ in range(3):
        p_old = _softmax(logits)
        for _ in range(8):
            logits = _descend(alpha, logits, p_old, p_data)
        divergences.append(_kl(p_data, _softmax(logits)))
    assert divergences[0] > 0.5
    assert (np.diff(divergences) < 1e-12).all()
    assert divergences[-1] < TOLERANCE


def _gap(p_data, p_old):
    """The estimate from as many pairs as have no noise."""
    count, log_probs = 1e12, np.log(p_old)
    means = [np.sum(p * log_probs) for p in (p_data, p_old)]
    return gap_of_moments(
        [
            [count, mean, count * np.sum(p * (log_probs - mean) ** 2), count]
            for p, mean in zip((p_data, p_old), means, strict=True)
        ]
    )


def test_the_gap_falls_to_zero_and_the_order_with_it():
    """Never above the divergence of order 2 that it is a bound of."""
    p_data, logits = _softmax(_logits(0)), _logits(1)
    gaps, orders = [], []
    for _ in range(5):
        p_old = _softmax(logits)
        gaps.append(_gap(p_data, p_old))
        divergence = oracles.renyi_divergence(p_data, p_old, 2)
        assert -1e-9 <= gaps[-1] <= divergence + 1e-9
        orders.append(_order(gaps[-1]))
        for _ in range(2):
            logits = _descend(orders[-1], logits, p_old, p_data)
    assert gaps[0] > 0.1
    assert (np.diff(gaps) <= 0).all()
    assert (np.diff(orders) <= 0).all()
    assert gaps[-1] < 1e-3
    assert orders[0] > 1.05 > orders[-1] + 0.04


def _order(gap):
    """What the scheduler makes of a gap, before it has seen a batch."""

    class Model:
        alpha = keras.Variable(1.0)
        gap = keras.Variable(0.0)
        gap_sums = keras.Variable(np.zeros((2, 4)))

    class Estimate:
        def gap(self, pairs):
            return gap

    scheduler = AlphaScheduler(gap=Estimate())
    scheduler.set_model(Model)
    ones = np.ones((2, 2))
    scheduler.on_score_end(1, PairBatch(ones, ones, ones, np.ones(2)))
    return float(keras.ops.convert_to_numpy(Model.alpha.value))


def test_gradient_descent_reaches_the_minimum():
    p_data = _softmax(_logits(0))
    logits = _logits(0) + 0.4 * _logits(1)
    p_old = _softmax(logits)
    for _ in range(15):
        logits = _descend(0.5, logits, p_old, p_data)
    divergence = oracles.renyi_divergence(p_data, p_old, 0.5)
    loss = _loss(0.5, ops.log_softmax(logits), p_old, p_data)
    assert float(loss) == pytest.approx(-divergence / 0.5, abs=TOLERANCE)
    np.testing.assert_allclose(_softmax(logits), p_data, atol=1e-4)
