"""The train step of `SelfPlayModel` on JAX."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_iris.arguments import check_shared
from keras_iris.backend.gradients import gradient_norm
from keras_iris.backend.jax_processes import local_rows, num_batch_shares
from keras_iris.backend.jax_products import fold_products
from keras_iris.backend.jax_state import SafeModel
from keras_iris.backend.refusals import refuse_layer_losses
from keras_iris.backend.routers import (
    has_routers,
    router_loss,
    router_sums,
    split_sums,
)
from keras_iris.data import PairDataset
from keras_iris.losses.stream import Stream, shares

# A pytree of arrays.
Tree = Any


def dataset(batches: PairDataset, *, is_training: bool = False) -> Any:
    """What `fit` takes for batches: they, or this process's share of each."""
    return local_rows(batches)


def is_on_cpu(tensor: jax.Array) -> bool:
    """Whether a tensor's products are made by the processor.

    Args:
        tensor: Any, a traced one as well.
    """
    return jax.default_backend() == "cpu"


def device_names() -> list[str]:
    """Names of the devices, for people to read."""
    return [device.device_kind for device in jax.devices()]


def cache_compilations(folder: Path) -> None:
    """Keeps compiled programs on disk, unless JAX was told where already."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def seed_step(seed: int) -> None:
    """Does nothing: dropout's seeds are variables of the model."""


remat = keras.remat


def prepare_remat() -> None:
    """Does nothing: rematerialised layers are right as they are."""


def write(cache: jax.Array, index: Any, new: jax.Array) -> jax.Array:
    """A cache with new positions.

    Args:
        cache: Tensor of shape `(batch, heads, total, width)`. It isn't to be
            used any more, as PyTorch writes to it.
        index: The first new position, an integer scalar.
        new: Tensor of shape `(batch, heads, time, width)`.
    """
    return jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis=2)


def write_rows(array: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
    """An array with other rows.

    Args:
        array: Of shape `(groups, rows, ...)`. It isn't to be used any more, as
            PyTorch writes to it.
        rows: Which ones of each group, integers of shape `(groups, n)`, none
            of them twice.
        new: What they are to be, of shape `(groups, n, ...)`.
    """

    def write_group(
        array: jax.Array, rows: jax.Array, new: jax.Array
    ) -> jax.Array:
        return array.at[rows].set(new, unique_indices=True)

    return jax.vmap(write_group)(array, rows, new)


def map_parts(
    function: Callable[[Tree], jax.Array], x: Tree, size: int
) -> jax.Array:
    """A function of a batch's parts, one after another.

    Args:
        function: Maps a part of `x` to a tensor with as many rows.
        x: Tensors with the batch as their first axis.
        size: Rows of a part.

    Returns:
        The tensor for the whole batch.
    """
    num_rows = jax.tree.leaves(x)[0].shape[0]
    parts = jax.tree.map(lambda a: _split(jnp.asarray(a), size, "edge"), x)
    return _join(jax.lax.map(function, parts), num_rows)


class Trainer(SafeModel):
    """A `keras.Model` with the micro-batched train step.

    The gradient of a batch-coupled loss weighs every example against all
    others of the batch. The loss is a sum of terms whose gradients are
    quotients of two sums over the batch (`losses/stream.py`), which
    are added up one micro-batch at a time. So each response goes through the
    model once for each term that it is in, which for the objectives of this
    package is once. Where there is more than one term, a second set of
    gradients is kept.
    """

    def device_scope(self) -> contextlib.AbstractContextManager[None]:
        """Where the optimizer makes its variables: anywhere."""
        return contextlib.nullcontext()

    def check_devices(self) -> None:
        """Refuses micro-batches that the devices don't divide."""
        size = self.micro_batch_size or 0
        check_shared("micro_batch_size", size, num_batch_shares())

    def stateless_call(self, *arguments: Any, **options: Any) -> Any:
        """Keras' own; when it trains on one CPU, with folded products."""
        call: Callable[..., Any] = functools.partial(
            super().stateless_call, **options
        )
        is_one_cpu = [device.platform for device in jax.devices()] == ["cpu"]
        is_compiled = self.jit_compile and not self.run_eagerly
        if options.get("training") and is_compiled and is_one_cpu:
            call = fold_products(call)
        return call(*arguments)

    def train_step(self, state: Tree, data: Tree) -> tuple[Tree, Tree]:
        """One optimizer step, with the exact gradient of the whole batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        num_rows = 0 if y is None else y.shape[0]  # without, the loss raises
        self.check_whole(num_rows)
        is_whole = (self.micro_batch_size or num_rows) >= num_rows
        differentiate = (
            self._whole_gradients if is_whole else self._micro_batched_gradients
        )
        trainable, _, optimizer_state, _ = state
        loss, y_pred, gradients, fixed, metrics_state = differentiate(
            state, x, y, sample_weight
        )
        norm = gradient_norm(gradients, self._scale_of(optimizer_state))
        metrics_state = [
            norm if variable is self.recent.gradient_norm else value
            for variable, value in zip(
                self.metrics_variables, metrics_state, strict=True
            )
        ]
        trainable, optimizer_state = self.optimizer.stateless_apply(
            optimizer_state, gradients, trainable
        )
        # The hook of Keras' own step (3.15); it has no public name.
        logs, metrics_state = self._update_metrics_variables(
            metrics_state, loss, x, y, y_pred, sample_weight
        )
        return logs, (trainable, fixed, optimizer_state, metrics_state)

    def _scale_of(
        self, optimizer_state: Tree
    ) -> Callable[[jax.Array], jax.Array]:
        """How the optimizer scales the loss, as it is in this state."""

        def scale(loss: jax.Array) -> jax.Array:
            pairs = zip(self.optimizer.variables, optimizer_state, strict=True)
            with keras.StatelessScope(state_mapping=list(pairs)):
                return self.optimizer.scale_loss(loss)

        return scale

    def _whole_gradients(
        self,
        state: Tree,
        x: Tree,
        y: jax.Array,
        sample_weight: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, Tree, Tree, Tree]:
        """As `_micro_batched_gradients`, in one pass, as Keras does it."""
        trainable, fixed, optimizer_state, metrics_state = state
        (_, (loss, y_pred, fixed, metrics_state)), gradients = (
            jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)(
                trainable,
                fixed,
                metrics_state,
                x,
                y,
                sample_weight,
                training=True,
                optimizer_variables=optimizer_state,
            )
        )
        return loss, y_pred, gradients, fixed, metrics_state

    def _micro_batched_gradients(
        self,
        state: Tree,
        x: Tree,
        y: jax.Array,
        sample_weight: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, Tree, Tree, Tree]:
        """Loss, log-probs, gradients, new fixed and metric variables."""
        trainable, fixed, optimizer_state, metrics_state = state
        scale = self._scale_of(optimizer_state)

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
            return loss, variables[2]

        if has_routers(self):
            return self._two_passes(trainable, fixed, x, batch_loss, scale)
        share = shares(sample_weight, y)
        with self._fixed_scope(fixed):
            streams = self.loss.streams(y, x["token_ids"][..., 0])
        sums: Tree = []
        columns: dict[int, jax.Array] = {}
        for stream in streams:
            y_pred, gradients, fixed = self._accumulate(
                stream, trainable, fixed, (x, y, share), scale
            )
            # One by one, or the gradients of all terms are held at once.
            if sums:
                gradients = jax.tree.map(jnp.add, sums, gradients)
            sums = gradients
            columns |= dict(zip(stream.columns, y_pred.T, strict=True))
        y_pred = jnp.stack([columns[i] for i in sorted(columns)], axis=1)

        def direct_loss(trainable: Tree) -> Tree:
            loss, metrics_state = batch_loss(trainable, y_pred)
            return scale(loss), (loss, metrics_state)

        # What the loss depends on beside the log-probs: weight regularisers.
        direct, (loss, metrics_state) = jax.grad(direct_loss, has_aux=True)(
            trainable
        )
        gradients = jax.tree.map(jnp.add, direct, sums)
        return loss, y_pred, gradients, fixed, metrics_state

    def _two_passes(
        self,
        trainable: Tree,
        fixed: Tree,
        x: Tree,
        batch_loss: Callable[[Tree, jax.Array], Tree],
        scale: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array, Tree, Tree, Tree]:
        """As `_micro_batched_gradients`, of a model with routers.

        A first pass gives the log-probs and the routers' sums, of which the
        loss is made; a second one, with the same dropout, the gradient.
        """
        num_rows, size = len(x["token_ids"]), self.micro_batch_size
        parts = (
            jax.tree.map(lambda a: _split(jnp.asarray(a), size, "edge"), x),
            _split(jnp.ones(x["token_ids"].shape[:2]), size),
        )
        num_parts = len(parts[1])

        def call(trainable: Tree, fixed: Tree, part: Tree) -> Tree:
            rows, row_weights = part
            with router_sums(self, row_weights):
                y_pred, fixed, losses = self.stateless_call(
                    trainable, fixed, rows, training=True, return_losses=True
                )
            sums, others = split_sums(losses)
            refuse_layer_losses(self, others)
            return (y_pred, sums), fixed

        def first(fixed: Tree, part: Tree) -> Tree:
            outputs, fixed = call(trainable, fixed, part)
            return fixed, outputs

        def whole_loss(trainable: Tree, outputs: Tree) -> Tree:
            y_pred = _join(outputs[0], num_rows)
            loss, metrics_state = batch_loss(trainable, y_pred)
            loss += router_loss(outputs[1].sum(axis=0), num_parts)
            return scale(loss), (loss, y_pred, metrics_state)

        def second(carry: Tree, part: Tree) -> Tree:
            (fixed, gradients), (part, coefficients) = carry, part
            _, pullback, fixed = jax.vjp(
                lambda trainable: call(trainable, fixed, part),
                trainable,
                has_aux=True,
            )
            new = pullback(coefficients)[0]
            return (fixed, jax.tree.map(jnp.add, gradients, new)), None

        _, outputs = jax.lax.scan(first, fixed, parts)
        (direct, coefficients), (loss, y_pred, metrics_state) = jax.grad(
            whole_loss, argnums=(0, 1), has_aux=True
        )(trainable, outputs)
        gradients = [
            g.astype(jnp.promote_types(g.dtype, "float32")) for g in direct
        ]
        (fixed, gradients), _ = jax.lax.scan(
            second, (fixed, gradients), (parts, coefficients)
        )
        return loss, y_pred, gradients, fixed, metrics_state

    def _accumulate(
        self,
        stream: Stream,
        trainable: Tree,
        fixed: Tree,
        batch: Tree,
        scale: Callable[[jax.Array], jax.Array],
    ) -> tuple[jax.Array, Tree, Tree]:
        """Log-probs of a term's responses, gradients, new fixed variables."""
        num_rows = batch[1].shape[0]
        size = stream.part_size(self.micro_batch_size, num_rows)
        x, y = jax.tree.map(lambda a: a[:, stream.columns], batch[:2])
        parts = (
            jax.tree.map(lambda a: _split(a, size, "edge"), (x, y)),
            _split(batch[2], size),
        )

        def step(carry: Tree, part: Tree) -> tuple[Tree, jax.Array]:
            (fixed, gradients, total, shift), ((x, y), share) = carry, part

            def call(trainable: Tree) -> tuple[jax.Array, Tree]:
                y_pred, new_fixed, losses = self.stateless_call(
                    trainable, fixed, x, training=True, return_losses=True
                )
                refuse_layer_losses(self, losses)
                return y_pred, new_fixed

            y_pred, pullback, new_fixed = jax.vjp(call, trainable, has_aux=True)

            def objective(y_pred: jax.Array) -> Tree:
                with self._fixed_scope(fixed):
                    value, *sums = stream.objective(y, y_pred, share, shift)
                return scale(value), sums

            coefficients, (weight, new_shift) = jax.grad(
                objective, has_aux=True
            )(y_pred)
            shrink = jnp.exp(shift - new_shift)
            gradients = jax.tree.map(
                lambda g, new: shrink * g + new,
                gradients,
                pullback(coefficients)[0],
            )
            carry = (new_fixed, gradients, shrink * total + weight, new_shift)
            return carry, y_pred

        zeros = [
            jnp.zeros(v.shape, jnp.promote_types(v.dtype, "float32"))
            for v in trainable
        ]
        shift = jnp.full((), stream.first_shift)
        (fixed, gradients, total, _), y_pred = jax.lax.scan(
            step, (fixed, zeros, jnp.zeros(()), shift), parts
        )
        total = jnp.where(total == 0, 1.0, total)
        gradients = jax.tree.map(lambda g: g / total, gradients)
        return _join(y_pred, num_rows), gradients, fixed

    def _fixed_scope(self, fixed: Tree) -> keras.StatelessScope:
        """Where variables have these values; losses read alpha."""
        pairs = zip(self.non_trainable_variables, fixed, strict=True)
        return keras.StatelessScope(state_mapping=list(pairs))


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
