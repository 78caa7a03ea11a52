import keras
import numpy as np
import pytest
from backend_helpers import gradient
from oracles import sequence_log_probs as oracle
from tiny_models import VOCABULARY_SIZE as MODEL_VOCABULARY_SIZE
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris import backend
from keras_iris.data import Example, PairDataset
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


def _chunked(monkeypatch):
    # Chunks of 6 tokens: the last of 4 has no response token.
    monkeypatch.setattr(log_probs, "_MIN_CHUNK_TOKENS", 6)
    monkeypatch.setattr(log_probs, "_MAX_LOGITS", 0)


def _log_probs(hidden, kernel, ids, mask):
    return log_probs.sequence_log_probs(
        keras.ops.convert_to_tensor(hidden),
        keras.ops.convert_to_tensor(ids),
        keras.ops.convert_to_tensor(mask),
        head=lambda h: keras.ops.matmul(h, kernel),
        vocabulary_size=VOCABULARY_SIZE,
    )


def test_chunks_agree_with_the_oracle(monkeypatch):
    hidden, kernel, ids, mask = _data()
    expected = oracle(hidden @ kernel, ids, mask)
    whole = _log_probs(hidden, kernel, ids, mask)
    _chunked(monkeypatch)
    chunks = _log_probs(hidden, kernel, ids, mask)
    for actual in (whole, chunks):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(actual), expected, rtol=1e-5
        )


def test_gradient_of_the_hidden_states(monkeypatch):
    hidden, kernel, ids, mask = _data()

    def total(h):
        weights = keras.ops.convert_to_tensor([1.0, -2.0, 0.5])
        return keras.ops.sum(weights * _log_probs(h, kernel, ids, mask))

    whole = gradient(total, hidden)
    _chunked(monkeypatch)
    np.testing.assert_allclose(
        gradient(total, hidden), whole, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("architecture", ["qwen", "mistral"])
def test_training_in_chunks(architecture, monkeypatch):
    """A tied and an untied head; the step is that of whole logits."""

    def train():
        causal_lm = make_causal_lm(architecture, num_layers=1)
        before = causal_lm.get_weights()
        model = keras_iris.SelfPlayModel(causal_lm)
        model.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras_iris.losses.IRIS(2.0),
            micro_batch_size=3,
        )
        pairs = make_pairs(batch_size=6)
        num_tokens = pairs["response_mask"].sum(-1).astype("float32")
        model.train_on_batch(pairs, -3.6 * num_tokens)
        return [
            new - old
            for new, old in zip(causal_lm.get_weights(), before, strict=True)
        ]

    expected = train()
    _chunked(monkeypatch)
    for change, whole in zip(train(), expected, strict=True):
        np.testing.assert_allclose(change, whole, rtol=1e-3, atol=1e-5)


# Eager, JAX takes long; compiled, PyTorch takes minutes.
JIT = {"jax": [True], "tensorflow": [False, True], "torch": [False]}


@pytest.mark.parametrize("jit_compile", JIT[keras.backend.backend()])
def test_lengths_that_are_unknown_in_tracing(jit_compile, monkeypatch):
    """`fit` over batches of two lengths, which TensorFlow traces once."""
    rng = np.random.default_rng(0)
    ids = [
        rng.integers(2, MODEL_VOCABULARY_SIZE, n).astype("int32")
        for n in (4, 4, 4, 40, 40, 40)
    ]

    def train():
        causal_lm = make_causal_lm(num_layers=1)
        before = causal_lm.get_weights()
        model = keras_iris.SelfPlayModel(causal_lm)
        model.compile(
            optimizer=keras.optimizers.SGD(0.1),
            loss=keras_iris.losses.IRIS(2.0),
            jit_compile=jit_compile,
        )
        pairs = PairDataset(
            [Example(i[:3], i) for i in ids],
            [i[::-1] for i in ids],
            np.full((6, 2), -60.0),
            batch_size=3,
        )
        model.fit(backend.dataset(pairs), shuffle=False, verbose=0)
        return [
            new - old
            for new, old in zip(causal_lm.get_weights(), before, strict=True)
        ]

    expected = train()
    _chunked(monkeypatch)
    for change, whole in zip(train(), expected, strict=True):
        np.testing.assert_allclose(change, whole, rtol=1e-3, atol=3e-5)
