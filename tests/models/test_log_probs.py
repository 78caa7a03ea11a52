import keras
import ml_dtypes
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
WEIGHTS = [1.0, -2.0, 0.5]  # of the rows, in a scalar to differentiate


def _data(rows=3, time=9, width=4):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(rows, time, width)).astype("float32")
    kernel = rng.normal(size=(width, VOCABULARY_SIZE)).astype("float32")
    ids = rng.integers(0, VOCABULARY_SIZE, (rows, time)).astype("int32")
    mask = np.zeros((rows, time), bool)
    mask[0, 2:5], mask[1, 4:], mask[2, [1, 3, 8]] = True, True, True
    return hidden, kernel, ids, mask


def _head(kernel, **options):
    head = keras.layers.ReversibleEmbedding(*kernel.T.shape, **options)
    head.build()
    head.embeddings.assign(kernel.T)
    if not head.tie_weights:
        head.embeddings.assign(2 * kernel.T)
        head.reverse_embeddings.assign(kernel)
    return head


def _in_bfloat16(array):
    return array.astype(ml_dtypes.bfloat16).astype("float32")


def _in_tiles(monkeypatch):
    # Chunks of 6 tokens, the last of 4 without a response token, and blocks
    # of 8 outputs, the last of 3.
    monkeypatch.setattr(log_probs, "_CPU_TILE", (6, 5))
    monkeypatch.setattr(log_probs, "_GPU_TILE", (6, 5))


def _log_probs(hidden, head, ids, mask):
    return log_probs.sequence_log_probs(
        keras.ops.convert_to_tensor(hidden),
        keras.ops.convert_to_tensor(ids),
        keras.ops.convert_to_tensor(mask),
        head=head,
    )


def _naive(hidden, head, ids, mask):
    """Log-probs from whole logits, for the backend to differentiate."""
    logits = head(hidden[:, :-1], reverse=True)
    found = keras.ops.log_softmax(keras.ops.cast(logits, "float32"))
    found = keras.ops.take_along_axis(found, ids[:, 1:, None], axis=2)[..., 0]
    return keras.ops.sum(keras.ops.where(mask[:, 1:], found, 0.0), axis=1)


HEADS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "capped": {"logit_soft_cap": 2.0},
    "frozen": {"trainable": False},
    "frozen, capped": {"trainable": False, "logit_soft_cap": 2.0},
    "frozen, untied": {"trainable": False, "tie_weights": False},
}
every_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)


@every_head
def test_tiles_agree_with_the_oracle(options, monkeypatch):
    hidden, kernel, ids, mask = _data()
    logits = hidden @ kernel
    if cap := options.get("logit_soft_cap"):
        logits = cap * np.tanh(logits / cap)
    expected = oracle(logits, ids, mask)
    head = _head(kernel, **options)
    whole = _log_probs(hidden, head, ids, mask)
    _in_tiles(monkeypatch)
    tiles = _log_probs(hidden, head, ids, mask)
    for actual in (whole, tiles):
        np.testing.assert_allclose(
            keras.ops.convert_to_numpy(actual), expected, rtol=1e-5
        )


def test_logits_far_below_the_rest(monkeypatch):
    """They neither take digits nor the normalizer with them."""
    hidden, kernel, ids, mask = _data()
    hidden[..., 0], kernel[0] = 1.0, 0.0
    kernel[0, ::4] = -1e6
    ids += ids % 4 == 0
    expected = oracle(hidden @ kernel, ids, mask)
    head = _head(kernel)
    _in_tiles(monkeypatch)
    found = _log_probs(hidden, head, ids, mask)
    found = keras.ops.convert_to_numpy(found)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tokens_agree_with_the_oracle(monkeypatch):
    hidden, kernel, ids, mask = _data()
    _in_tiles(monkeypatch)
    found = log_probs.token_log_probs(hidden, ids, mask, head=_head(kernel))
    found = keras.ops.convert_to_numpy(found)
    for row, t in np.ndindex(found.shape):
        only = np.zeros_like(mask)
        only[row, t + 1] = mask[row, t + 1]
        expected = oracle(hidden @ kernel, ids, only)[row]
        np.testing.assert_allclose(found[row, t], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "num_outputs, tile_outputs, expected",
    [
        (32_000, 32_768, (32_000, 1, 0)),
        # As few equal blocks as a size that is a multiple of 8 allows, ...
        (151_936, 32_768, (18_992, 8, 0)),
        # ... or any size, ...
        (151_936, 8_192, (4_748, 32, 0)),
        # ... or blocks and a rest.
        (50_257, 8_192, (7_184, 6, 7_153)),
        (7, 5, (7, 1, 0)),
    ],
)
def test_blocks_of_outputs(num_outputs, tile_outputs, expected):
    options = backend.HeadOptions(512, tile_outputs, None, True)
    assert options.blocks(num_outputs) == expected


@pytest.mark.parametrize(
    "num_tokens, expected",
    [(0, 32_768), (8_192, 32_768), (16_384, 16_384), (10**6, 8_192)],
)
def test_tiles_of_many_tokens_have_fewer_outputs(num_tokens, expected):
    options = backend.HeadOptions(2_048, 32_768, None, True)
    options = options.with_all_tokens(num_tokens)
    assert (options.tile_tokens, options.tile_outputs) == (num_tokens, expected)


@pytest.mark.parametrize("shape", [(2, 1), (0, 5), (2, 5)])
def test_no_tokens(shape):
    head = keras.layers.ReversibleEmbedding(16, 8)
    head.build()
    hidden = np.zeros((*shape, 8), "float32")
    ids, mask = np.zeros(shape, "int32"), np.zeros(shape, bool)
    found = log_probs.sequence_log_probs(hidden, ids, mask, head=head)
    found = keras.ops.convert_to_numpy(found)
    np.testing.assert_array_equal(found, np.zeros(shape[0]))
    if shape == (2, 5):
        found = gradient(
            lambda h: keras.ops.sum(_log_probs(h, head, ids, mask)), hidden
        )
        np.testing.assert_array_equal(found, np.zeros_like(hidden))


@every_head
def test_gradient_of_the_hidden_states(options, monkeypatch):
    hidden, kernel, ids, mask = _data()
    head = _head(kernel, **options)

    def total(function):
        return lambda h: keras.ops.sum(
            keras.ops.convert_to_tensor(WEIGHTS) * function(h, head, ids, mask)
        )

    expected = gradient(total(_naive), hidden)
    whole = gradient(total(_log_probs), hidden)
    _in_tiles(monkeypatch)
    for actual in (whole, gradient(total(_log_probs), hidden)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tied", "capped", "frozen", "frozen, capped"])
@pytest.mark.parametrize("surprise", [0.5, 1e-2, 1e-4])  # nats
def test_gradient_of_confident_tokens(surprise, kind, monkeypatch):
    """In bfloat16, where one minus a rounded probability is noise."""
    _, kernel, ids, _ = _data(width=32)
    kernel = _in_bfloat16(kernel)
    head = _head(kernel, dtype="mixed_bfloat16", **HEADS[kind])
    head.logit_soft_cap = cap = 50.0 if "capped" in kind else None
    own = np.eye(VOCABULARY_SIZE)[ids[:, 1:]]

    def exact(states):
        """Tokens' surprise, and gradients by hidden states."""
        logits, slope = np.float64(states @ kernel), 1.0
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
            slope = 1 - (logits / cap) ** 2
        softmax = np.exp(logits - np.logaddexp.reduce(logits, 2)[..., None])
        others = np.where(own, 0, softmax)
        total = others.sum(axis=2, keepdims=True)
        by_logits = np.where(own, total, -others) * slope
        return -np.log1p(-total), by_logits @ np.float64(kernel).T

    # Each as long as it takes.
    states = np.zeros((*own.shape[:2], 32), "float32")
    for length in np.geomspace(0.01, 10, 400):
        longer = _in_bfloat16(length * own @ kernel.T)
        states = np.where(exact(states)[0] > surprise, longer, states)
    surprises, expected = exact(states)
    assert (surprises < surprise).all() and (surprises > surprise / 3).all()
    hidden = np.pad(states, ((0, 0), (0, 1), (0, 0)))
    mask = np.arange(ids.shape[1]) > np.zeros_like(ids)
    _in_tiles(monkeypatch)
    found = gradient(
        lambda h: keras.ops.sum(_log_probs(h, head, ids, mask)), hidden
    )
    errors = np.linalg.norm(found[:, :-1] - expected, axis=2)
    # Rounded logits alone make 0.06.
    assert (errors / np.linalg.norm(expected, axis=2)).max() < 0.12


class Scorer(keras.Model):
    """Trains an embedding, and as a head, on top of fixed hidden states."""

    def __init__(self, function, head, ids, mask):
        super().__init__()
        self.function, self.head = function, head
        self.ids, self.mask = ids, mask

    def call(self, hidden):
        hidden = keras.ops.add(hidden, self.head(self.ids))
        return self.function(hidden, self.head, self.ids, self.mask)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("tied", "float32"),
        ("untied", "float32"),
        ("capped", "float32"),
        ("tied", "mixed_bfloat16"),
    ],
)
def test_gradient_of_the_head(kind, dtype, monkeypatch):
    hidden, kernel, ids, mask = _data()

    def train(function):
        head = _head(kernel, dtype=dtype, **HEADS[kind])
        model = Scorer(function, head, ids, mask)
        model.compile(
            keras.optimizers.SGD(1.0),
            loss=lambda weights, found: weights * found,
            jit_compile=False,
        )
        model.train_on_batch(hidden, np.float32(WEIGHTS))
        return [keras.ops.convert_to_numpy(w) for w in head.weights]

    expected = train(_naive)
    assert not np.allclose(expected[-1].ravel()[:4], kernel[:, 0], atol=1e-3)
    whole = train(_log_probs)
    _in_tiles(monkeypatch)
    tiles = train(_log_probs)
    tolerance = {"float32": 1e-5, "mixed_bfloat16": 2e-2}[dtype]
    for actual in (whole, tiles):
        for matrix, naive in zip(actual, expected, strict=True):
            np.testing.assert_allclose(matrix, naive, atol=tolerance)


@pytest.mark.parametrize("architecture", ["qwen", "mistral"])
def test_training_in_tiles(architecture, monkeypatch):
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
    _in_tiles(monkeypatch)
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
    _in_tiles(monkeypatch)
    for change, whole in zip(train(), expected, strict=True):
        np.testing.assert_allclose(change, whole, rtol=1e-3, atol=3e-5)
