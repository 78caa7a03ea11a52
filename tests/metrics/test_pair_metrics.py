"""Metrics of pairs, against float64 NumPy."""

import time

import keras
import numpy as np
import oracles
import pytest

from keras_iris import metrics
from keras_iris.metrics import PairBatch
from keras_iris.metrics.monitor import step_values
from keras_iris.metrics.recent import RecentLogProbs

TOLERANCE = 1e-5
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], "float32")
ALPHA, GAP, NORM = 1.75, 0.4, 3.5
OF_BATCHES = ("real_ess", "synthetic_ess", "divergence")


def _batch(num_rows=6, seed=0, weight=None):
    rng = np.random.default_rng(seed)
    opponent = rng.normal(-20, 5, (num_rows, 2)).astype("float32")
    policy = opponent + rng.normal(size=(num_rows, 2)).astype("float32")
    num_tokens = rng.integers(1, 9, (num_rows, 2))
    weight = np.ones(num_rows) if weight is None else weight
    return PairBatch(
        opponent,
        policy,
        num_tokens,
        weight,
        ALPHA,
        GAP,
        gradient_norm=NORM,
    )


def _join(*batches):
    fields = [np.concatenate(f) for f in list(zip(*batches, strict=True))[:4]]
    return PairBatch(*fields, ALPHA, GAP, gradient_norm=NORM)


def _number(tensor):
    return float(keras.ops.convert_to_numpy(tensor))


def _expected(batch):
    """Values by metric name, of one batch."""
    weight = np.ravel(batch.sample_weight)
    kept = weight > 0
    weight = weight[kept].astype("float64")
    real, synthetic = batch.log_ratio[kept].astype("float64").T
    nll = -(weight @ batch.policy[kept]) / (weight @ batch.num_tokens[kept])

    def share(values, tilt):
        weights = oracles.tilted_weights(values, tilt, weight)
        return oracles.effective_sample_size(weights)

    def mean(values):
        return np.average(values, weights=weight)

    return {
        "real_log_ratio": mean(real),
        "synthetic_log_ratio": mean(synthetic),
        "margin": mean(real - synthetic),
        "margin_accuracy": mean(real > synthetic),
        "real_ess": share(real, ALPHA - 1),
        "synthetic_ess": share(synthetic, ALPHA),
        "divergence": -oracles.iris(real, synthetic, ALPHA, weight),
        "real_nll": nll[0],
        "synthetic_nll": nll[1],
        "nll_gap": nll[0] - nll[1],
        "alpha": ALPHA,
        "gap": GAP,
        "gradient_norm": NORM,
    }


def _values(*batches):
    values = {}
    for metric in metrics.self_play_metrics():
        for batch in batches:
            metric.update_state(batch.to_tensors())
        values[metric.name] = _number(metric.result())
    return values


def _approx(values):
    return pytest.approx(values, rel=1e-4, abs=TOLERANCE)


@pytest.mark.parametrize("weight", [None, WEIGHT, WEIGHT[:, None]])
def test_one_batch(weight):
    batch = _batch(weight=weight)
    assert _values(batch) == _approx(_expected(batch))


def test_on_the_host_a_batch_has_the_same_values():
    batch = _batch(weight=WEIGHT)
    values = step_values(batch)
    assert values == _approx(_expected(batch))
    assert list(values) == [m.name for m in metrics.self_play_metrics()]


def test_that_is_soon_done():
    step_values(_batch())
    start = time.perf_counter()
    for seed in range(20):
        step_values(_batch(seed=seed))
    assert (time.perf_counter() - start) / 20 < 0.1


def test_rows_of_weight_zero_may_hold_nan():
    batch = _batch(weight=WEIGHT)
    expected = _expected(batch)
    batch.policy[WEIGHT == 0] = np.nan
    assert _values(batch) == _approx(expected)
    assert step_values(batch) == _approx(expected)


def test_over_batches_sums_or_means():
    first, second = _batch(6), _batch(3, seed=1)
    # A batch without a row that counts changes nothing.
    nothing = _batch(3, seed=2, weight=np.zeros(3))
    one, two = _expected(first), _expected(second)
    expected = _expected(_join(first, second))
    for name in OF_BATCHES:
        expected[name] = (one[name] + two[name]) / 2
    assert _values(first, second, nothing) == _approx(expected)


def test_alpha_and_gap_are_the_latest():
    values = _values(_batch(), _batch()._replace(alpha=0.5, gap=0.1))
    assert (values["alpha"], values["gap"]) == pytest.approx((0.5, 0.1))


def test_nothing_yet():
    assert set(_values().values()) == {0.0}


def test_reset():
    for metric in metrics.self_play_metrics():
        metric.update_state(_batch().to_tensors())
        metric.reset_state()
        assert _number(metric.result()) == 0.0


def test_half_precision():
    log_probs = keras.ops.cast(np.full((300, 2), -300.0), "float16")
    batch = PairBatch(log_probs, log_probs, np.full((300, 2), 3), np.ones(300))
    values = _values(batch)
    assert values["real_nll"] == values["synthetic_nll"] == 100.0


def test_effective_sample_size_by_hand():
    values = np.log([1.0, 2.0, 1.0]).astype("float32")
    # Weights 1/4, 1/2, 1/4: 1 / (3 * 6/16).
    size = metrics.effective_sample_size(values, 1.0)
    assert _number(size) == pytest.approx(16 / 18)
    assert _number(metrics.effective_sample_size(values * 0, 3.0)) == 1.0
    collapsed = np.eye(8, dtype="float32")[3] * 1000
    size = metrics.effective_sample_size(collapsed, 2.0)
    assert _number(size) == pytest.approx(1 / 8)
    assert _number(metrics.effective_sample_size(values, 1.0, values * 0)) == 0


def test_effective_sample_size_of_several_tilts():
    values = np.random.default_rng(0).normal(size=6).astype("float32")
    tilts = np.linspace(-2, 2, 5)
    sizes = metrics.effective_sample_size(values, tilts, WEIGHT)
    kept = WEIGHT > 0
    expected = [
        oracles.effective_sample_size(
            oracles.tilted_weights(values[kept], tilt, WEIGHT[kept])
        )
        for tilt in tilts
    ]
    assert keras.ops.convert_to_numpy(sizes) == pytest.approx(expected)


@pytest.mark.parametrize("metric", metrics.self_play_metrics())
def test_config_round_trip(metric):
    config = keras.saving.serialize_keras_object(metric)
    copy = keras.saving.deserialize_keras_object(config)
    assert type(copy) is type(metric)
    assert copy.get_config() == metric.get_config()


def test_names():
    names = [metric.name for metric in metrics.self_play_metrics()]
    assert sorted(names) == [
        "alpha",
        "divergence",
        "gap",
        "gradient_norm",
        "margin",
        "margin_accuracy",
        "nll_gap",
        "real_ess",
        "real_log_ratio",
        "real_nll",
        "synthetic_ess",
        "synthetic_log_ratio",
        "synthetic_nll",
    ]


def test_recent_batches():
    recent = RecentLogProbs(num_rows=10)
    assert recent.since(0) == []
    batches = [
        _batch(n, seed=n, weight=np.r_[0, np.ones(n - 1)]) for n in (3, 4, 5)
    ]
    for batch in batches:
        recent.update_state(batch.to_tensors())
        recent.reset_state()  # by an `evaluate`, or at an epoch's end
    np.testing.assert_array_equal(recent.latest().policy, batches[2].policy[1:])
    latest = recent.since(1)
    for seen, batch in zip(latest, batches[1:], strict=True):
        for field, expected in zip(seen[:4], batch[:4], strict=True):
            np.testing.assert_array_equal(field, expected[1:])
    # One row of the first is gone.
    with pytest.raises(ValueError, match="10 at most"):
        recent.since(0)
