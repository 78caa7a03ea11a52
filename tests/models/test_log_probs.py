import keras
import numpy as np
from backend_helpers import gradient
from oracles import sequence_log_probs as oracle

from keras_iris.models import log_probs

VOCABULARY_SIZE = 11


def _data(rows=3, time=9, width=4):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, time, width)).astype("float32")
    kernel = rng.normal(size=(width, VOCABULARY_SIZE)).astype("float32")
    ids = rng.integers(0, VOCABULARY_SIZE, (rows, time)).astype("int32")
    mask = np.zeros((rows, time), bool)
    mask[0, 2:5], mask[1, 4:], mask[2, [1, 3, 8]] = True, True, True
    return hidden, kernel, ids, mask


def _sum(hidden, kernel, ids, mask):
    return keras.ops.sum(
        log_probs.sequence_log_probs(
            hidden,
            ids,
            mask,
            head=lambda h: keras.ops.matmul(h, kernel),
            vocabulary_size=VOCABULARY_SIZE,
        )
        * keras.ops.convert_to_tensor([1.0, -2.0, 0.5])
    )


def test_chunks_agree_with_the_oracle_and_their_gradients_too(monkeypatch):
    hidden, kernel, ids, mask = _data()
    expected = oracle(hidden @ kernel, ids, mask)
    whole = {
        "hidden": gradient(lambda h: _sum(h, kernel, ids, mask), hidden),
        "kernel": gradient(lambda k: _sum(hidden, k, ids, mask), kernel),
    }
    # 6 tokens a chunk: 2 of each row, and the last chunks have no response.
    monkeypatch.setattr(log_probs, "_MIN_CHUNK_TOKENS", 6)
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", 0)
    actual = log_probs.sequence_log_probs(
        keras.ops.convert_to_tensor(hidden),
        keras.ops.convert_to_tensor(ids),
        keras.ops.convert_to_tensor(mask),
        head=lambda h: keras.ops.matmul(h, kernel),
        vocabulary_size=VOCABULARY_SIZE,
    )
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(actual), expected, rtol=1e-5
    )
    np.testing.assert_allclose(
        gradient(lambda h: _sum(h, kernel, ids, mask), hidden),
        whole["hidden"],
        rtol=1e-4,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        gradient(lambda k: _sum(hidden, k, ids, mask), kernel),
        whole["kernel"],
        rtol=1e-4,
        atol=1e-6,
    )
