"""Log-probs of a language-model head on TensorFlow."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_iris.backend.head import HeadOptions

# Nested lists and tuples of tensors.
Tree = Any


def head_log_probs(
    hidden: tf.Tensor,
    table: tf.Tensor,
    token_ids: tf.Tensor,
    num_used: tf.Tensor,
    options: HeadOptions,
) -> tf.Tensor:
    """Log-probs of tokens, from hidden states, without the logits of all.

    See `keras_iris.backend.jax_head.head_log_probs`.
    """
    size = options.tile_tokens
    num_tokens = tf.shape(token_ids)[0]
    padding = -num_tokens % size
    width = hidden.shape[-1]
    token_ids = tf.pad(token_ids, [[0, padding]])
    token_ids = tf.reshape(token_ids, (-1, size))
    # Chunks without a token in use are skipped.
    num_chunks = -(-tf.cast(num_used, "int32") // size)

    def log_probs(hidden: tf.Tensor, table: tf.Tensor) -> Any:
        head = _Head(hidden, table, token_ids, num_chunks, options)
        values, normalizer, by_hidden = head.forward(
            with_gradient=not options.is_trained
        )

        def pull_back(upstream: tf.Tensor) -> Any:
            if options.is_trained:
                return head.backward(normalizer, upstream)
            scaled = upstream[..., None] * tf.cast(by_hidden, "float32")
            return tf.cast(scaled, hidden.dtype), None

        return values, pull_back

    hidden = tf.pad(hidden, [[0, padding], [0, 0]])
    hidden = tf.reshape(hidden, (-1, size, width))
    values = tf.custom_gradient(log_probs)(hidden, tf.convert_to_tensor(table))
    return tf.reshape(values, (-1,))[:num_tokens]


class _Head:
    """The loops over blocks of outputs and chunks of tokens.

    Hidden states are of shape `(chunks, tokens, width)` here, and all else of
    a token `(chunks, tokens)`.
    """

    def __init__(
        self,
        hidden: tf.Tensor,
        table: tf.Tensor,
        token_ids: tf.Tensor,
        num_chunks: tf.Tensor,
        options: HeadOptions,
    ) -> None:
        self.hidden = hidden
        self.table = table
        self.token_ids = token_ids
        self.num_chunks = num_chunks
        self.options = options

    def forward(
        self, *, with_gradient: bool
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | None]:
        """Log-probs, log-normalizers, and gradients by hidden states."""
        zeros = tf.zeros(tf.shape(self.token_ids))
        state = [zeros - float("inf"), zeros, zeros]
        if with_gradient:
            state.append(tf.zeros(tf.shape(self.hidden)))

        def add_tile(c: Any, start: Any, block: Any, old: Tree) -> Tree:
            largest, total, chosen, *mean = old
            logits, index, is_own = self._tile(c, start, block)
            own = tf.gather(logits, index, batch_dims=1)
            chosen = tf.where(is_own, own, chosen)
            new = tf.maximum(largest, tf.reduce_max(logits, axis=1))
            shrink = tf.exp(largest - new)
            weights = tf.exp(logits - new[:, None])
            total = shrink * total + tf.reduce_sum(weights, axis=1)
            if with_gradient:
                # Beside a probability near 1 the rounding of products would be
                # all that is left.
                rows = tf.range(self.options.tile_tokens)
                others = tf.tensor_scatter_nd_update(
                    weights,
                    tf.stack([rows, index], axis=1),
                    tf.where(
                        is_own, 0.0, tf.gather(weights, index, batch_dims=1)
                    ),
                )
                others = self.options.before_cap(others, logits)
                product = _matmul(tf.cast(others, block.dtype), block)
                mean = [shrink[:, None] * mean[0] + product]
            return [new, total, chosen, *mean]

        def add_block(start: Any, block: tf.Tensor, state: Tree) -> Tree:
            def step(c: tf.Tensor, state: Tree) -> Tree:
                new = add_tile(c, start, block, [a[c] for a in state])
                return [
                    _with_chunk(a, c, part)
                    for a, part in zip(state, new, strict=True)
                ]

            return _loop(self.num_chunks, step, state)

        state = self._over_blocks(add_block, state)
        largest, total, chosen, *mean = state
        total = tf.where(total > 0, total, 1.0)
        normalizer = largest + tf.math.log(total)
        by_hidden = None
        if with_gradient:
            # Infinite where a chunk was skipped.
            own = -tf.math.expm1(tf.minimum(chosen - normalizer, 0.0))
            own = self.options.before_cap(own, chosen)[..., None]
            rows = tf.cast(tf.gather(self.table, self.token_ids), "float32")
            by_hidden = own * rows - mean[0] / total[..., None]
            by_hidden = tf.cast(by_hidden, self.hidden.dtype)
        return chosen - normalizer, normalizer, by_hidden

    def backward(
        self, normalizer: tf.Tensor, upstream: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Gradients by the hidden states and by the table."""

        def add_block(start: Any, block: tf.Tensor, gradients: Tree) -> Tree:
            def step(c: tf.Tensor, gradients: Tree) -> Tree:
                by_hidden, by_block = gradients
                logits, index, is_own = self._tile(c, start, block)
                softmax = tf.exp(logits - normalizer[c][:, None])
                by_logits = softmax * -upstream[c][:, None]
                rows = tf.range(self.options.tile_tokens)
                by_logits = tf.tensor_scatter_nd_add(
                    by_logits,
                    tf.stack([rows, index], axis=1),
                    tf.where(is_own, upstream[c], 0.0),
                )
                by_logits = self.options.before_cap(by_logits, logits)
                by_logits = tf.cast(by_logits, block.dtype)
                by_chunk = by_hidden[c] + _matmul(by_logits, block)
                by_block += _matmul(by_logits, self.hidden[c], is_first_t=True)
                return [_with_chunk(by_hidden, c, by_chunk), by_block]

            by_hidden, by_table = gradients
            by_block = tf.zeros(tf.shape(block))
            by_hidden, by_block = _loop(
                self.num_chunks, step, [by_hidden, by_block]
            )
            rows = start + tf.range(tf.shape(block)[0])
            by_block = tf.cast(by_block, by_table.dtype)
            return [
                by_hidden,
                tf.tensor_scatter_nd_update(by_table, rows[:, None], by_block),
            ]

        by_hidden, by_table = self._over_blocks(
            add_block,
            [tf.zeros(tf.shape(self.hidden)), tf.zeros_like(self.table)],
        )
        return tf.cast(by_hidden, self.hidden.dtype), by_table

    def _over_blocks(
        self, add_block: Callable[[Any, tf.Tensor, Tree], Tree], state: Tree
    ) -> Tree:
        """The state after `add_block(first_output, block, state)` of all."""
        num_outputs, width = self.table.shape
        size, number, rest = self.options.blocks(num_outputs)

        def step(start: Any, size: int, state: Tree) -> Tree:
            # Not `[start : start + size]`: XLA needs to know the size.
            block = tf.slice(self.table, (start, 0), (size, width))
            return add_block(start, tf.cast(block, self.hidden.dtype), state)

        if number == 1:
            state = step(0, size, state)
        else:
            state = _loop(number, lambda i, s: step(i * size, size, s), state)
        return step(number * size, rest, state) if rest else state

    def _tile(
        self, c: tf.Tensor, start: Any, block: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Logits, where each token is in the block, and whether it is."""
        logits = _matmul(self.hidden[c], block, is_second_t=True)
        cap = self.options.soft_cap
        if cap is not None:
            logits = cap * tf.tanh(logits / cap)
        index = tf.cast(self.token_ids[c], "int32") - start
        last = block.shape[0] - 1
        is_own = (index >= 0) & (index <= last)
        return logits, tf.clip_by_value(index, 0, last), is_own


def _loop(
    number: Any, step: Callable[[tf.Tensor, Tree], Tree], state: Tree
) -> Tree:
    """The state after `state = step(i, state)` for all i, one at a time."""
    return tf.while_loop(
        lambda i, *_: i < number,
        lambda i, *state: (i + 1, *step(i, list(state))),
        (tf.constant(0), *state),
        parallel_iterations=1,
    )[1:]


def _with_chunk(array: tf.Tensor, c: tf.Tensor, chunk: tf.Tensor) -> tf.Tensor:
    return tf.tensor_scatter_nd_update(array, [[c]], chunk[None])


def _matmul(
    a: tf.Tensor,
    b: tf.Tensor,
    *,
    is_first_t: bool = False,
    is_second_t: bool = False,
) -> tf.Tensor:
    product = tf.matmul(a, b, transpose_a=is_first_t, transpose_b=is_second_t)
    return tf.cast(product, "float32")
