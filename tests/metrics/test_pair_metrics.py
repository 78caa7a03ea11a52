"""Metrics of log-ratios and of the order, against float64 NumPy."""

import keras
import numpy as np
import oracles
import pytest

from keras_iris import metrics
from keras_iris.losses import IRIS

TOLERANCE = 1e-5
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], "float32")
ALPHA = 1.75


def _pairs(num_rows=6, seed=0):
    rng = np.random.default_rng(seed)
    opponent = rng.normal(-20, 5, (num_rows, 2)).astype("float32")
    return opponent, opponent + rng.normal(size=(num_rows, 2)).astype("float32")


def _number(tensor):
    return float(keras.ops.convert_to_numpy(tensor))


def _expected(y_true, y_pred, weight):
    """Values by metric name, of one batch."""
    kept = weight > 0
    weight = weight[kept].astype("float64")
    real, synthetic = (y_pred - y_true)[kept].astype("float64").T

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
        "alpha": ALPHA,
    }


def _make_metrics():
    made = [
        metric
        for metric in metrics.self_play_metrics()
        if not isinstance(metric, metrics.TokenMetric)
    ]
    for metric in made:
        if isinstance(metric, metrics.AlphaMetric):
            metric.bind_alpha(keras.Variable(ALPHA))
    return made


@pytest.mark.parametrize("weight", [None, WEIGHT, WEIGHT[:, None]])
def test_one_batch(weight):
    y_true, y_pred = _pairs()
    flat = np.ones(6) if weight is None else weight.ravel()
    expected = _expected(y_true, y_pred, flat)
    values = {}
    for metric in _make_metrics():
        metric.update_state(y_true, y_pred, weight)
        values[metric.name] = _number(metric.result())
    assert values == pytest.approx(expected, rel=1e-4, abs=TOLERANCE)


def test_rows_of_weight_zero_may_hold_nan():
    y_true, y_pred = _pairs()
    expected = _expected(y_true, y_pred, WEIGHT)
    y_pred[WEIGHT == 0] = np.nan
    for metric in _make_metrics():
        metric.update_state(y_true, y_pred, WEIGHT)
        value = _number(metric.result())
        assert value == pytest.approx(expected[metric.name], rel=1e-4, abs=1e-5)


def test_means_are_over_pairs_or_batches():
    first, second = _pairs(6), _pairs(3, seed=1)
    both = [
        np.concatenate(arrays) for arrays in zip(first, second, strict=True)
    ]
    expected = _expected(*both, np.ones(9))
    one, two = (_expected(*p, np.ones(len(p[0]))) for p in (first, second))
    for metric in _make_metrics():
        for pairs in (first, second):
            metric.update_state(*pairs)
        # A batch without a row that counts changes nothing.
        metric.update_state(*second, np.zeros(3))
        name = metric.name
        mean = (one[name] + two[name]) / 2
        is_of_batches = name in ("real_ess", "synthetic_ess", "divergence")
        assert _number(metric.result()) == pytest.approx(
            mean if is_of_batches else expected[name], rel=1e-4
        )


def test_reset_keeps_the_order():
    for metric in _make_metrics():
        metric.update_state(*_pairs())
        metric.reset_state()
        expected = ALPHA if metric.name == "alpha" else 0.0
        assert _number(metric.result()) == expected
        if isinstance(metric, metrics.AlphaMetric):
            assert _number(metric.alpha.value) == ALPHA


def test_the_order_is_copied_from_a_variable_that_is_not_the_metrics():
    variable = keras.Variable(0.5)
    metric = metrics.Alpha(variable)
    assert len(metric.variables) == 1
    assert metric.variables[0] is not variable
    variable.assign(2.0)
    metric.copy_alpha()
    assert _number(metric.result()) == 2.0
    assert metric.get_config()["alpha"] == 2.0


def test_effective_sample_size_by_hand():
    y_true = np.zeros((3, 2), "float32")
    y_pred = np.log([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]).astype("float32")
    metric = metrics.SyntheticEffectiveSampleSize(1.0)
    metric.update_state(y_true, y_pred)
    # Weights 1/4, 1/2, 1/4: 1 / (3 * 6/16).
    assert _number(metric.result()) == pytest.approx(16 / 18)
    metric = metrics.RealEffectiveSampleSize(3.0)
    metric.update_state(y_true, y_pred)
    assert _number(metric.result()) == pytest.approx(1.0)


def test_weights_that_collapse():
    metric = metrics.SyntheticEffectiveSampleSize(2.0)
    y_pred = np.zeros((8, 2), "float32")
    y_pred[3] = 1000.0
    metric.update_state(np.zeros((8, 2), "float32"), y_pred)
    assert _number(metric.result()) == pytest.approx(1 / 8)


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
        "margin",
        "margin_accuracy",
        "real_ess",
        "real_log_ratio",
        "real_nll",
        "synthetic_ess",
        "synthetic_log_ratio",
        "synthetic_nll",
    ]


def test_compiled_into_a_model():
    y_true, y_pred = _pairs()
    model = keras.Sequential([keras.layers.Identity()])
    model.compile(loss=IRIS(ALPHA), weighted_metrics=_make_metrics())
    values = model.evaluate(
        y_pred,
        y_true,
        sample_weight=WEIGHT,
        batch_size=6,
        verbose=0,
        return_dict=True,
    )
    expected = _expected(y_true, y_pred, WEIGHT)
    expected["loss"] = -expected["divergence"]
    assert values == pytest.approx(expected, rel=1e-4, abs=TOLERANCE)
