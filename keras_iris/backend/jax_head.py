"""Log-probs of a language-model head on JAX."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_iris.backend.head import HeadOptions

# A pytree of arrays.
Tree = Any


def head_log_probs(
    hidden: jax.Array,
    table: jax.Array,
    token_ids: jax.Array,
    num_used: jax.Array,
    options: HeadOptions,
) -> jax.Array:
    """Log-probs of tokens, from hidden states, without the logits of all.

    Logits exist one tile at a time: a block of outputs by a chunk of tokens.
    The backward pass computes them again and finishes the table's gradient
    block after block. Where the table isn't trained, the forward pass makes
    the gradient of each token's log-prob by its hidden state as well, and
    nothing is computed twice.

    Args:
        hidden: Hidden states of shape `(tokens, width)`, in the dtype of the
            products.
        table: Output embeddings of shape `(outputs, width)`, of any dtype.
        token_ids: Integer tensor of shape `(tokens,)`.
        num_used: How many tokens, from the first on, are asked for.
        options: Sizes, and what is asked of the head.

    Returns:
        Float32 tensor of shape `(tokens,)`, in nats; of no meaning from
        `num_used` on.
    """
    num_tokens = len(token_ids)
    padding = -num_tokens % options.tile_tokens
    inputs = _Inputs(
        hidden=jnp.pad(hidden, ((0, padding), (0, 0))),
        table=table,
        token_ids=jnp.pad(token_ids, (0, padding)),
        num_used=num_used,
    )
    return _log_probs(inputs, options)[:num_tokens]


class _Inputs(NamedTuple):
    """Those of `head_log_probs`, whole chunks of tokens; or their gradients."""

    hidden: Any
    table: Any
    token_ids: Any = None
    num_used: Any = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _log_probs(inputs: _Inputs, options: HeadOptions) -> jax.Array:
    return _Head(inputs, options).forward(with_gradient=False)[0]


def _forward(inputs: _Inputs, options: HeadOptions) -> Tree:
    log_probs, normalizer, by_hidden = _Head(inputs, options).forward(
        with_gradient=not options.is_trained
    )
    return log_probs, (inputs, normalizer) if options.is_trained else by_hidden


def _backward(options: HeadOptions, kept: Tree, upstream: jax.Array) -> Tree:
    if options.is_trained:
        inputs, normalizer = kept
        return (_Head(inputs, options).backward(normalizer, upstream),)
    by_hidden = upstream[:, None] * kept
    return (_Inputs(by_hidden.astype(kept.dtype), None),)


_log_probs.defvjp(_forward, _backward)


class _Head:
    """The loops over blocks of outputs and chunks of tokens."""

    def __init__(self, inputs: _Inputs, options: HeadOptions) -> None:
        self.hidden, self.table, self.token_ids, num_used = inputs
        self.options = options
        # Chunks without a token in use are skipped at run time.
        self.num_chunks = -(-num_used // options.tile_tokens)

    def forward(
        self, *, with_gradient: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Log-probs, log-normalizers, and gradients by hidden states."""
        zeros = _zeros(self.token_ids)
        state = {"largest": zeros - jnp.inf, "sum": zeros, "chosen": zeros}
        if with_gradient:
            state["mean"] = _zeros(self.hidden)

        def add_tile(c: jax.Array, start: Any, block: Tree, old: Tree) -> Tree:
            logits, is_chosen = self._tile(c, start, block)
            largest = jnp.maximum(old["largest"], logits.max(axis=1))
            shrink = jnp.exp(old["largest"] - largest)
            weights = jnp.exp(logits - largest[:, None])
            chosen = jnp.sum(jnp.where(is_chosen, logits, 0.0), axis=1)
            new = {
                "largest": largest,
                "sum": shrink * old["sum"] + weights.sum(axis=1),
                "chosen": old["chosen"] + chosen,
            }
            if with_gradient:
                # Beside a probability near 1 the rounding of products would be
                # all that is left.
                others = jnp.where(is_chosen, 0.0, weights)
                others = self.options.before_cap(others, logits)
                new["mean"] = shrink[:, None] * old["mean"]
                new["mean"] += _matmul(others.astype(block.dtype), block)
            return new

        def add_block(start: Any, block: jax.Array, state: Tree) -> Tree:
            def step(c: jax.Array, state: Tree) -> Tree:
                old = jax.tree.map(lambda a: self._chunk(a, c), state)
                new = add_tile(c, start, block, old)
                return jax.tree.map(
                    lambda a, part: self._with_chunk(a, c, part), state, new
                )

            return jax.lax.fori_loop(0, self.num_chunks, step, state)

        state = self._over_blocks(add_block, state)
        total = jnp.where(state["sum"] > 0, state["sum"], 1.0)
        normalizer = state["largest"] + jnp.log(total)
        by_hidden = None
        if with_gradient:
            # Infinite where a chunk was skipped.
            log_probs = jnp.minimum(state["chosen"] - normalizer, 0.0)
            own = -jnp.expm1(log_probs)
            own = self.options.before_cap(own, state["chosen"])[:, None]
            by_hidden = own * jnp.take(self.table, self.token_ids, axis=0)
            by_hidden -= state["mean"] / total[:, None]
            by_hidden = by_hidden.astype(self.hidden.dtype)
        return state["chosen"] - normalizer, normalizer, by_hidden

    def backward(self, normalizer: jax.Array, upstream: jax.Array) -> _Inputs:
        """Gradients by the hidden states and by the table."""

        def add_block(start: Any, block: jax.Array, gradients: Tree) -> Tree:
            def step(c: jax.Array, gradients: Tree) -> Tree:
                by_hidden, by_block = gradients
                logits, is_chosen = self._tile(c, start, block)
                softmax = jnp.exp(logits - self._chunk(normalizer, c)[:, None])
                by_logits = jnp.where(is_chosen, 1.0 - softmax, -softmax)
                by_logits *= self._chunk(upstream, c)[:, None]
                by_logits = self.options.before_cap(by_logits, logits)
                by_logits = by_logits.astype(block.dtype)
                by_chunk = self._chunk(by_hidden, c)
                by_chunk += _matmul(by_logits, block)
                by_block += _matmul(by_logits.T, self._chunk(self.hidden, c))
                return self._with_chunk(by_hidden, c, by_chunk), by_block

            by_hidden, by_table = gradients
            by_hidden, by_block = jax.lax.fori_loop(
                0, self.num_chunks, step, (by_hidden, _zeros(block))
            )
            return by_hidden, jax.lax.dynamic_update_slice_in_dim(
                by_table, by_block.astype(by_table.dtype), start, axis=0
            )

        by_hidden, by_table = self._over_blocks(
            add_block, (_zeros(self.hidden), jnp.zeros_like(self.table))
        )
        return _Inputs(by_hidden.astype(self.hidden.dtype), by_table)

    def _over_blocks(
        self, add_block: Callable[[Any, jax.Array, Tree], Tree], state: Tree
    ) -> Tree:
        """The state after `add_block(first_output, block, state)` of all."""
        size, number, rest = self.options.blocks(len(self.table))

        def step(start: Any, size: int, state: Tree) -> Tree:
            block = jax.lax.dynamic_slice_in_dim(self.table, start, size)
            return add_block(start, block.astype(self.hidden.dtype), state)

        if number == 1:
            state = step(0, size, state)
        else:
            state = jax.lax.fori_loop(
                0, number, lambda i, s: step(i * size, size, s), state
            )
        return step(number * size, rest, state) if rest else state

    def _tile(
        self, c: jax.Array, start: Any, block: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Logits `(tokens, outputs)`, and which are of the token itself."""
        logits = _matmul(self._chunk(self.hidden, c), block.T)
        cap = self.options.soft_cap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        output = start + jnp.arange(len(block))
        return logits, output == self._chunk(self.token_ids, c)[:, None]

    def _chunk(self, array: jax.Array, c: jax.Array) -> jax.Array:
        size = self.options.tile_tokens
        return jax.lax.dynamic_slice_in_dim(array, c * size, size)

    def _with_chunk(
        self, array: jax.Array, c: jax.Array, chunk: jax.Array
    ) -> jax.Array:
        start = c * self.options.tile_tokens
        return jax.lax.dynamic_update_slice_in_dim(array, chunk, start, axis=0)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type="float32")


def _zeros(array: jax.Array) -> jax.Array:
    return jnp.zeros(array.shape, "float32")
