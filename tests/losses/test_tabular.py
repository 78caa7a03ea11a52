"""Exact self-play of a categorical "language model": no sampling.

Its one response is one of 50 symbols, and every mean over responses is an
expectation: a tilted risk with the probabilities as weights.
"""

import numpy as np
import oracles
import pytest
from backend_helpers import gradient, precision
from keras import ops

from keras_iris.losses import IRIS, tilted_risk

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
