"""The train step of `SelfPlayModel` on JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_iris.data import PairDataset

# A pytree of arrays.
Tree = Any


def dataset(batches: PairDataset) -> PairDataset:
    """What `fit` takes for batches of several lengths: they themselves."""
    return batches


def seed_step(seed: int) -> None:
    """Does nothing: dropout's seeds are variables of the model."""


def sum_chunks(
    function: Callable[..., jax.Array], arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """Sums `function(*chunk)` over the chunks, rematerialising each.

    Chunks whose last array, a mask, is all zero come last; they are skipped
    at run time.

    Args:
        function: Maps one chunk of each array to a tensor, which has a
            gradient by the first array and by variables.
        arrays: Arrays of shape `(num_chunks, ...)`; the last is a mask.

    Returns:
        The sum, of the shape of one `function(*chunk)`.
    """
    # A scan: XLA keeps the memory of every turn of an unrolled loop.
    result = jax.eval_shape(function, *(array[0] for array in arrays))
    zeros = jnp.zeros(result.shape, result.dtype)

    def value(chunk: Tree) -> jax.Array:
        return jax.lax.cond(
            jnp.any(chunk[-1]), lambda: function(*chunk), lambda: zeros
        )

    def step(total: jax.Array, chunk: Tree) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(value)(chunk), None

    return jax.lax.scan(step, zeros, arrays)[0]


def token_log_probs(logits: jax.Array, token_ids: jax.Array) -> jax.Array:
    """Log-probs of tokens, in nats.

    Args:
        logits: Float32 tensor of shape `(tokens, vocabulary)`.
        token_ids: Integer tensor of shape `(tokens,)`.

    Returns:
        Float32 tensor of shape `(tokens,)`.
    """
    # Not a gather, whose gradient is a scatter into new logits.
    is_chosen = jnp.arange(logits.shape[1]) == token_ids[:, None]
    chosen = jnp.sum(jnp.where(is_chosen, logits, 0.0), axis=1)
    return chosen - jax.nn.logsumexp(logits, axis=1)


class Trainer(keras.Model):
    """A `keras.Model` with the micro-batched train step.

    The gradient of a batch-coupled loss needs the log-probs of the whole
    batch first: one pass computes them, the loss turns them into the
    coefficients dL/dlog p, and a second pass accumulates the gradients that
    the coefficients weigh, one micro-batch at a time. An additive loss gives
    its coefficients row by row, so that one pass does.
    """

    def train_step(self, state: Tree, data: Tree) -> tuple[Tree, Tree]:
        """One optimizer step, with the exact gradient of the whole batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        num_rows = y.shape[0]
        if (self.micro_batch_size or num_rows) >= num_rows:
            return super().train_step(state, data)
        if sample_weight is None:
            sample_weight = jnp.ones((num_rows,), "float32")
        trainable, _, optimizer_state, _ = state
        loss, y_pred, gradients, fixed, metrics_state = (
            self._micro_batched_gradients(state, x, y, sample_weight)
        )
        trainable, optimizer_state = self.optimizer.stateless_apply(
            optimizer_state, gradients, trainable
        )
        # The hook of Keras' own step (3.15); it has no public name.
        logs, metrics_state = self._update_metrics_variables(
            metrics_state, loss, x, y, y_pred, sample_weight
        )
        return logs, (trainable, fixed, optimizer_state, metrics_state)

    def _micro_batched_gradients(
        self, state: Tree, x: Tree, y: jax.Array, sample_weight: jax.Array
    ) -> tuple[jax.Array, jax.Array, Tree, Tree, Tree]:
        """Loss, log-probs, gradients, new fixed and metric variables."""
        trainable, fixed, optimizer_state, metrics_state = state
        num_rows, size = y.shape[0], self.micro_batch_size
        batches = jax.tree.map(lambda a: _split(a, size, "edge"), x)

        def scale(loss: jax.Array) -> jax.Array:
            pairs = zip(self.optimizer.variables, optimizer_state, strict=True)
            with keras.StatelessScope(state_mapping=list(pairs)):
                return self.optimizer.scale_loss(loss)

        def batch_loss(trainable: Tree, y_pred: jax.Array) -> Tree:
            loss, variables = self.stateless_compute_loss(
                trainable,
                fixed,
                metrics_state,
                x=x,
                y=y,
                y_pred=y_pred,
                sample_weight=sample_weight,
                training=True,
            )
            return scale(loss), (loss, variables[2])

        def row_loss(y_pred: jax.Array, y: jax.Array, w: jax.Array) -> Tree:
            share = jnp.sum(w) / jnp.sum(sample_weight)
            return scale(self.loss(y, y_pred, w) * share)

        def log_probs(fixed: Tree, x: Tree) -> tuple[Tree, jax.Array]:
            y_pred, fixed = self.stateless_call(
                trainable, fixed, x, training=True
            )
            return fixed, y_pred

        def accumulate(carry: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
            (fixed, gradients), (x, given) = carry, batch
            y_pred, pullback, fixed = jax.vjp(
                lambda t: self.stateless_call(t, fixed, x, training=True),
                trainable,
                has_aux=True,
            )
            if self.loss.is_additive:
                given = jax.grad(row_loss)(y_pred, *given)
            gradients = jax.tree.map(jnp.add, gradients, pullback(given)[0])
            # Unused log-probs cost nothing: XLA drops their computation.
            return (fixed, gradients), y_pred

        if self.loss.is_additive:
            given = _split(y, size, "edge"), _split(sample_weight, size)
        else:
            _, first_pass = jax.lax.scan(log_probs, fixed, batches)
            coefficients, _ = jax.grad(batch_loss, argnums=1, has_aux=True)(
                trainable, _join(first_pass, num_rows)
            )
            given = _split(coefficients, size)
        zeros = [
            jnp.zeros(v.shape, jnp.promote_types(v.dtype, "float32"))
            for v in trainable
        ]
        (new_fixed, gradients), y_pred = jax.lax.scan(
            accumulate, (fixed, zeros), (batches, given)
        )
        if not self.loss.is_additive:
            y_pred = first_pass
        y_pred = _join(y_pred, num_rows)
        # What the loss depends on beside the log-probs: weight regularisers.
        direct, (loss, metrics_state) = jax.grad(batch_loss, has_aux=True)(
            trainable, y_pred
        )
        gradients = jax.tree.map(jnp.add, gradients, direct)
        return loss, y_pred, gradients, new_fixed, metrics_state


def _split(array: jax.Array, size: int, padding: str = "constant") -> jax.Array:
    """Cuts rows into strided micro-batches: `(num_micro_batches, size, ...)`.

    Strided, so that a batch axis that is sharded over devices stays sharded
    inside every micro-batch. The last is padded with zeros, or with copies of
    the last row ("edge").
    """
    widths = [(0, -array.shape[0] % size)] + [(0, 0)] * (array.ndim - 1)
    array = jnp.pad(array, widths, mode=padding)
    return array.reshape(size, -1, *array.shape[1:]).swapaxes(0, 1)


def _join(array: jax.Array, num_rows: int) -> jax.Array:
    """Undoes `_split`: `(num_rows, ...)`."""
    return array.swapaxes(0, 1).reshape(-1, *array.shape[2:])[:num_rows]
