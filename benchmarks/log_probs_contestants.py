"""The two ways of `log_probs.py`: by chunks, and all logits at once."""

import time

import harness
import numpy as np

NUM_ROWS = 8
ERROR_TOKENS = 300
RANDOM_ROWS = 5_000


class LogProbs:
    """The sum of all log-probs and its gradient.

    Args:
        way: "naive" or "keras_iris".
        size: `tokens`, `width`, `vocabulary`, `dtype` and `is_trained`:
            whether the head gets a gradient.
    """

    def __init__(self, way, size):
        import keras_iris  # noqa: F401 (its memory isn't the step's)

        self.way, self.size = way, size
        self.table = self._make_table(size["width"])
        self.head = self.step = None

    def run(self):
        """Seconds and memory (MB) of one loss and gradient."""
        import keras

        if self.step is None:
            self._make_head(self.size["dtype"])
            self.table = None
            make = {"jax": self._jax, "tensorflow": self._tensorflow}
            self.temp_mb = None
            self.step = make.get(keras.backend.backend(), self._torch)()
        memory_mb, seconds = harness.memory_above(self._time_step)
        return {"seconds": seconds, "memory_mb": self.temp_mb or memory_mb}

    def error(self, dtype, width):
        """The largest error of a token's log-prob, in nats."""
        from keras import ops

        self.table = self._make_table(width)
        self._make_head(dtype)
        hidden, ids, mask = self._data(ERROR_TOKENS, 2)
        hidden = ops.cast(hidden, self.head.compute_dtype)
        found = ops.convert_to_numpy(self._log_probs(hidden, ids, mask))
        exact = ops.convert_to_numpy(ops.cast(hidden[:, 0], "float32"))
        expected = _reference(exact, self.table, ids[:, 1])
        return float(np.abs(found - expected).max())

    def _make_table(self, width):
        """Embeddings of shape `(vocabulary, width)`."""
        # Random rows, again and again: so many new ones take long.
        rows = np.random.default_rng(0).standard_normal(
            (RANDOM_ROWS, width), "float32"
        )
        return np.resize(
            rows / np.sqrt(width).astype("float32"),
            (self.size["vocabulary"], width),
        )

    def _make_head(self, dtype):
        import keras

        self.head = keras.layers.ReversibleEmbedding(
            *self.table.shape,
            dtype="mixed_bfloat16" if dtype == "bfloat16" else dtype,
            trainable=self.size["is_trained"],
        )
        self.head.build()
        self.head.embeddings.assign(self.table)

    def _time_step(self):
        start = time.perf_counter()
        self.step()
        harness.synchronize()
        return time.perf_counter() - start

    def _data(self, rows, length):
        rng = np.random.default_rng(1)
        hidden = rng.standard_normal(
            (rows, length, self.head.output_dim), "float32"
        )
        ids = rng.integers(0, self.size["vocabulary"], (rows, length))
        mask = np.ones((rows, length), bool)
        mask[:, 0] = False
        return hidden, ids.astype("int32"), mask

    def _batch(self):
        from keras import ops

        hidden, ids, mask = self._data(
            NUM_ROWS, self.size["tokens"] // NUM_ROWS + 1
        )
        return ops.cast(hidden, self.head.compute_dtype), ids, mask

    def _log_probs(self, hidden, ids, mask):
        from keras_iris.models import sequence_log_probs

        function = naive if self.way == "naive" else sequence_log_probs
        return function(hidden, ids, mask, head=self.head)

    def _jax(self):
        import jax
        import keras

        hidden, ids, mask = self._batch()
        table = self.head.embeddings

        def loss(value, hidden):
            with keras.StatelessScope(state_mapping=[(table, value)]):
                return self._log_probs(hidden, ids, mask).sum()

        sources = (0, 1) if self.size["is_trained"] else 1
        step = jax.jit(jax.value_and_grad(loss, argnums=sources))
        compiled = step.lower(table.value, hidden).compile()
        memory = compiled.memory_analysis()
        self.temp_mb = memory.temp_size_in_bytes / 1e6
        return lambda: jax.block_until_ready(compiled(table.value, hidden))

    def _tensorflow(self):
        import tensorflow as tf

        hidden, ids, mask = self._batch()
        ids, mask = tf.constant(ids), tf.constant(mask)
        table = self.head.embeddings.value
        sources = [hidden, table] if self.size["is_trained"] else [hidden]

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                tape.watch(hidden)
                loss = tf.reduce_sum(self._log_probs(hidden, ids, mask))
            return loss, tape.gradient(loss, sources)

        step.get_concrete_function()
        return lambda: step()[0].numpy()

    def _torch(self):
        import torch

        hidden, ids, mask = self._batch()
        hidden.requires_grad_()
        ids, mask = torch.as_tensor(ids), torch.as_tensor(mask)
        table = self.head.embeddings.value

        def step():
            table.grad = hidden.grad = None
            loss = self._log_probs(hidden, ids, mask).sum()
            loss.backward()

        return step


def naive(hidden, ids, mask, *, head):
    """Log-probs from the logits of all tokens."""
    from keras import ops

    logits = ops.cast(head(hidden[:, :-1], reverse=True), "float32")
    log_probs = ops.log_softmax(logits)  # (rows, time, vocabulary)
    chosen = ops.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]
    return ops.sum(ops.where(mask[:, 1:], chosen, 0.0), axis=1)


def _reference(hidden, table, ids, block=8_192):
    """Float64 log-probs of `ids`, a block of the vocabulary at a time."""
    hidden = hidden.astype("float64")
    total = np.full(len(hidden), -np.inf)
    for start in range(0, len(table), block):
        logits = hidden @ table[start : start + block].astype("float64").T
        total = np.logaddexp(total, np.logaddexp.reduce(logits, axis=1))
    return (hidden * table[ids].astype("float64")).sum(1) - total
