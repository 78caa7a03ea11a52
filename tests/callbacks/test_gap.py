"""The gap between model and data, on language models in NumPy."""

import numpy as np
import pytest

from keras_iris.callbacks import RenyiGap
from keras_iris.callbacks.gap import (
    add_moments,
    gap_of_moments,
    pair_moments,
)
from keras_iris.metrics import PairBatch

NUM_SYMBOLS, LENGTH, NUM_PAIRS = 12, 8, 2000


def _softmax(logits):
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def _bigram(seed, scale=1.5):
    rng = np.random.default_rng(seed)
    return _softmax(scale * rng.normal(size=(NUM_SYMBOLS, NUM_SYMBOLS)))


def _sample(model, seed, number=NUM_PAIRS):
    """Sequences of a bigram model, from symbol 0 on."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((number, LENGTH + 1), int)
    for t in range(LENGTH):
        cumulative = model[ids[:, t]].cumsum(axis=1)
        draws = rng.random((number, 1))
        ids[:, t + 1] = (draws > cumulative).sum(axis=1).clip(0, 11)
    return ids


def _log_probs(model, ids):
    return np.log(model)[ids[:, :-1], ids[:, 1:]].sum(axis=1)


def _pairs(opponent, data, synthetic):
    log_probs = [_log_probs(opponent, ids) for ids in (data, synthetic)]
    log_probs = np.stack(log_probs, axis=1)
    ones = np.ones(len(log_probs))
    tokens = np.full(log_probs.shape, LENGTH)
    return PairBatch(log_probs, log_probs, tokens, ones)


def _gap(opponent, data, seed=1, number=NUM_PAIRS):
    pairs = _pairs(
        opponent,
        _sample(data, 2 * seed, number),
        _sample(opponent, 2 * seed + 1, number),
    )
    return RenyiGap().gap(pairs)


def test_by_hand():
    pairs = PairBatch(
        opponent=np.array([[-2.0, -8.0], [-6.0, -4.0], [-6.0, -12.0]]),
        policy=np.zeros((3, 2)),
        num_tokens=np.array([[1, 2], [2, 1], [3, 2]]),
        sample_weight=np.ones(3),
    )
    # Per token -2, -3, -2 (mean -7/3, variance 1/3) and -4, -4, -6 (mean
    # -14/3, variance 4/3).
    d2 = ((7 / 3) ** 2 - (1 / 3) / 3 - (4 / 3) / 3) / (4 / 3)
    assert RenyiGap().gap(pairs) == pytest.approx(np.log(1 + d2))
    # The scale of weights says nothing, as in the loss.
    for scale in (0.01, 100.0):
        scaled = pairs._replace(sample_weight=np.full(3, scale))
        assert RenyiGap().gap(scaled) == pytest.approx(np.log(1 + d2))


def test_annotated_responses_that_are_in_several_pairs():
    """Which makes them no more responses: NumPy, of each once."""
    rng = np.random.default_rng(0)
    num_samples, number = 3, 10
    real = rng.normal(-2, 1, number)
    synthetic = rng.normal(-4, 1, number * num_samples)
    log_probs = np.stack([np.repeat(real, num_samples), synthetic], axis=1)
    pairs = PairBatch(
        5 * log_probs,
        log_probs,
        np.full(log_probs.shape, 5),
        np.ones(len(log_probs)),
        num_samples=num_samples,
    )
    noise = [np.var(s, ddof=1) / len(s) for s in (real, synthetic)]
    excess = (real.mean() - synthetic.mean()) ** 2 - sum(noise)
    gap = np.log(1 + excess / np.var(synthetic, ddof=1))
    assert RenyiGap().gap(pairs) == pytest.approx(gap)


def test_own_samples_have_no_gap():
    """Within three standard errors: d2's is sqrt(2) * (1/N + 1/M)."""
    model = _bigram(0)
    error = np.sqrt(2) * 2 / NUM_PAIRS
    gaps = [_gap(model, model, seed) for seed in range(20)]
    assert max(gaps) < 3 * error
    # It is clipped at 0, about where half of them are.
    assert 0 < np.mean(np.array(gaps) == 0) < 1


def test_it_grows_with_the_distance_from_the_data():
    data = _bigram(0)
    dialect = np.roll(data, 1, axis=1)  # every symbol is spelled as the next
    uniform = np.full_like(data, 1 / NUM_SYMBOLS)

    def trained(share):
        return share * data + (1 - share) * uniform

    gaps = [
        _gap(opponent, data)
        for opponent in (data, trained(0.9), trained(0.5), dialect)
    ]
    assert gaps[0] < 0.01
    assert (np.diff(gaps) > 0.01).all()
    assert gaps[-1] > 1


def test_moments_of_parts_are_those_of_the_whole():
    data, model = _bigram(0), _bigram(1)
    pairs = _pairs(model, _sample(data, 0), _sample(model, 1))
    parts = np.zeros((2, 4), "float32")
    for start in range(0, NUM_PAIRS, 64):
        part = PairBatch(*(array[start : start + 64] for array in pairs[:4]))
        parts = add_moments(parts, pair_moments(part)).astype("float32")
    np.testing.assert_allclose(parts, pair_moments(pairs), rtol=1e-5)


@pytest.mark.parametrize("number", [0, 1])
def test_too_few_pairs_have_no_gap(number):
    ones = np.ones((number, 2))
    pairs = PairBatch(-ones, -ones, ones, np.ones(number))
    assert RenyiGap().gap(pairs) == 0.0


def test_synthetic_responses_that_are_all_the_same():
    ones = np.ones((4, 2))
    pairs = PairBatch(-ones * [1, 2], -ones, ones, np.ones(4))
    assert 20 < RenyiGap().gap(pairs) < 40


def _moments(values, weight):
    tokens = np.ones((len(values), 2))
    return pair_moments(PairBatch(values, values, tokens, weight))


def test_weights_count_as_the_noise_that_they_leave():
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 1.5, 64)
    means, gaps, even = [], [], []
    for _ in range(2000):
        values = rng.normal(size=(64, 2))
        moments = _moments(values, weight)
        means.append(moments[:, 1])
        gaps.append(gap_of_moments(moments))
        even.append(gap_of_moments(_moments(values, np.ones(64))))
    count = weight.sum() ** 2 / (weight**2).sum()
    noise = 1 / count
    assert np.var(means) == pytest.approx(noise, rel=0.1)
    # The same share of them is above 0 as where all weigh alike.
    shares = [np.mean(np.array(g) > 0) for g in (gaps, even)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
    assert gap_of_moments(_moments(values, 1e-20 * weight)) == pytest.approx(
        gap_of_moments(_moments(values, weight))
    )


def test_weighted_batches_add_up():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 2))
    values[:32, 0] += 6
    weight = rng.exponential(size=64) * np.repeat([10.0, 1.0], 32)
    whole = _moments(values, weight)
    parts = np.zeros((2, 4))
    for i in range(0, 64, 8):
        part = _moments(values[i : i + 8], weight[i : i + 8])
        parts = add_moments(parts, part)
    np.testing.assert_allclose(parts, whole)
    mean = np.average(values, axis=0, weights=weight)
    np.testing.assert_allclose(whole[:, 1], mean)
