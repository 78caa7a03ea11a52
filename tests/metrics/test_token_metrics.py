"""NLL per token and gap, by hand."""

import keras
import numpy as np
import pytest

from keras_iris.metrics import Gap, RealNLL, SyntheticNLL, TokenMetric

LOG_PROBS = np.array([[-4.0, -1.0], [-2.0, -2.0], [-9.0, -6.0]], "float32")
NUM_TOKENS = np.array([[2, 3], [1, 3], [3, 2]])


def _values(*batches):
    values = []
    for metric in (RealNLL(), SyntheticNLL(), Gap()):
        assert isinstance(metric, TokenMetric)
        for batch in batches:
            metric.update_state(*batch)
        values.append(float(keras.ops.convert_to_numpy(metric.result())))
    return values


def test_nats_over_tokens():
    assert _values((NUM_TOKENS, LOG_PROBS)) == pytest.approx(
        [15 / 6, 9 / 8, 15 / 6 - 9 / 8]
    )


def test_sums_over_batches():
    batches = [(NUM_TOKENS[:2], LOG_PROBS[:2]), (NUM_TOKENS[2:], LOG_PROBS[2:])]
    assert _values(*batches) == pytest.approx(_values((NUM_TOKENS, LOG_PROBS)))


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_weights(shape):
    weight = np.array([1.0, 0.0, 2.0], "float32").reshape(shape)
    log_probs = LOG_PROBS.copy()
    log_probs[1] = np.nan
    assert _values((NUM_TOKENS, log_probs, weight)) == pytest.approx(
        [22 / 8, 13 / 7, 22 / 8 - 13 / 7]
    )


def test_no_tokens():
    assert _values() == [0.0, 0.0, 0.0]


def test_half_precision():
    log_probs = keras.ops.cast(np.full((300, 2), -300.0), "float16")
    values = _values((np.full((300, 2), 3), log_probs))
    assert values == pytest.approx([100.0, 100.0, 0.0])
