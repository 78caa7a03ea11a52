"""Tilted risks against an oracle in extended precision."""

import keras
import numpy as np
import oracles
import pytest
from backend_helpers import gradient, precision

from keras_iris.losses import tilted_risk, tilted_weights

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
VALUES = [0.5, -1.0, 2.0, 0.0]
WEIGHTS = [0.5, 3.0, 0.25, 1.0]
TILTS = [-100.0, -2.0, -0.1, -1e-8, 0.0, 1e-12, 1e-4, 0.5, 1, 30]


def _number(tensor):
    return float(keras.ops.convert_to_numpy(tensor))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight", [None, WEIGHTS])
def test_value_and_gradient(dtype, weight):
    with precision(dtype):
        values = np.array(VALUES, dtype)
        for tilt in TILTS:
            value = tilted_risk(values, tilt, weight)
            expected = oracles.tilted_risk(values, tilt, weight)
            assert _number(value) == pytest.approx(
                expected, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]
            )
            assert keras.backend.standardize_dtype(value.dtype) == dtype
            expected = oracles.tilted_weights(values, tilt, weight)
            for actual in (
                gradient(lambda x, t=tilt: tilted_risk(x, t, weight), values),
                keras.ops.convert_to_numpy(
                    tilted_weights(values, tilt, weight)
                ),
            ):
                np.testing.assert_allclose(
                    actual, expected, atol=TOLERANCE[dtype]
                )


def test_continuous_through_zero():
    # float32; a naive log-mean-exp over t is off by 1e-7 / t.
    values = np.array([30.0, -20.0, 4.0, 7.0], "float32")
    mean, variance = values.mean(), values.var()
    for tilt in [sign * 10.0**-n for sign in (1, -1) for n in range(5, 40, 4)]:
        value = _number(tilted_risk(values, tilt))
        assert value == pytest.approx(mean + tilt * variance / 2, abs=1e-5)
        slope = gradient(lambda x, t=tilt: tilted_risk(x, t), values)
        # Its own slope in t is p (f - mean), at most 7.
        np.testing.assert_allclose(slope, 0.25, atol=7 * abs(tilt) + 1e-6)


@pytest.mark.parametrize("tilt", [-3.0, -1.0, 0.0, 1e-20, 0.5, 2.0])
def test_large_values(tilt):
    values = np.array([1000.0, -1000.0, 3.0], "float32")
    value = _number(tilted_risk(values, tilt))
    expected = oracles.tilted_risk(values, tilt if abs(tilt) > 1e-9 else 0)
    assert value == pytest.approx(expected, rel=1e-5)
    slope = gradient(lambda x: tilted_risk(x, tilt), values)
    expected = {-1: [0, 1, 0], 0: [1 / 3] * 3, 1: [1, 0, 0]}
    np.testing.assert_allclose(
        slope, expected[round(np.sign(tilt) * (abs(tilt) > 0.1))], atol=1e-6
    )


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("none", [0.0, -2.0])
def test_rows_that_do_not_count_may_hold_anything(tilt, junk, none):
    values = np.array([*VALUES, junk], "float32")
    weight = [*WEIGHTS, none]
    value = _number(tilted_risk(values, tilt, weight))
    expected = oracles.tilted_risk(VALUES, tilt, WEIGHTS)
    assert value == pytest.approx(expected, rel=1e-5)
    expected = [*oracles.tilted_weights(VALUES, tilt, WEIGHTS), 0.0]
    slope = gradient(lambda x: tilted_risk(x, tilt, weight), values)
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    weights = keras.ops.convert_to_numpy(tilted_weights(values, tilt, weight))
    np.testing.assert_allclose(weights, expected, atol=1e-6)


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
def test_no_rows_that_count(tilt):
    values = np.array([1.0, np.nan], "float32")
    zeros = [0.0, 0.0]
    assert _number(tilted_risk(values, tilt, zeros)) == 0.0
    slope = gradient(lambda x: tilted_risk(x, tilt, zeros), values)
    np.testing.assert_array_equal(slope, zeros)
    weights = keras.ops.convert_to_numpy(tilted_weights(values, tilt, zeros))
    np.testing.assert_array_equal(weights, zeros)


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
def test_nan_that_counts_is_not_hidden(tilt):
    assert np.isnan(_number(tilted_risk([1.0, np.nan, 2.0], tilt)))


@pytest.mark.parametrize("tilt", [-1.0, 0.0, 2.0])
def test_only_the_ratio_of_weights_matters(tilt):
    values = np.array(VALUES, "float32")
    for factor in (1e-6, 7.0, 1e6):
        value = tilted_risk(values, tilt, factor * np.array(WEIGHTS))
        expected = oracles.tilted_risk(VALUES, tilt, WEIGHTS)
        assert _number(value) == pytest.approx(expected, rel=1e-5)


def test_tilt_of_every_kind():
    variable = keras.Variable(0.5)
    tensor = keras.ops.convert_to_tensor(0.5)
    expected = oracles.tilted_risk(VALUES, 0.5)
    for tilt in (0.5, np.float64(0.5), variable, tensor):
        value = _number(tilted_risk(VALUES, tilt))
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_cast_up(dtype):
    # 300 values of mean 300: their sum overflows float16.
    values = keras.ops.cast(np.full(300, 300.0), dtype)
    for tilt in (0.0, 1.0):
        value = tilted_risk(values, tilt)
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        assert _number(value) == pytest.approx(300.0)
