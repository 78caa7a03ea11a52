"""The train step of `SelfPlayModel` on TensorFlow."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_iris.backend.gradients import gradient_norm
from keras_iris.backend.refusals import (
    refuse_distribution,
    refuse_layer_losses,
)
from keras_iris.backend.routers import (
    has_routers,
    router_loss,
    router_sums,
    split_sums,
)
from keras_iris.backend.tensorflow_processes import gather, gathered
from keras_iris.data import PairDataset
from keras_iris.losses.stream import Stream, shares

remat = keras.remat


def prepare_remat() -> None:
    """Switches a pass of Grappler off, in the whole process.

    In some traces it (2.21) lets the optimizer write a variable before a
    rematerialised layer has read it: the gradient is wrong.
    """
    options = {"dependency_optimization": False}
    tf.config.optimizer.set_experimental_options(options)


def dataset(
    batches: PairDataset, *, is_training: bool = False
) -> tf.data.Dataset:
    """What `fit` takes for batches of the data set's bucket lengths.

    Keras (3.15) would take the shapes from the first two batches. Those of a
    resumed epoch may be of one length, and another trace of the step rounds
    in another way.

    Args:
        batches: Batches `(inputs, log_probs, sample_weight)`.
    """

    def generate() -> Iterator[Any]:
        for index in range(len(batches)):
            yield batches[index]

    has_one_length = len(batches.bucket_lengths) == 1

    def signature(array: Any) -> tf.TensorSpec:
        # Only (batch, 2, time) has a dimension that may change. What XLA
        # makes of an unknown one is slower.
        is_known = has_one_length or array.ndim < 3
        shape = array.shape if is_known else (*array.shape[:2], None)
        return tf.TensorSpec(shape, array.dtype)

    result = tf.data.Dataset.from_generator(
        generate,
        output_signature=keras.tree.map_structure(signature, batches[0]),
    )
    result = result.apply(
        tf.data.experimental.assert_cardinality(len(batches))
    ).prefetch(1)
    # There is nothing to tune, and the thread that would makes the end of
    # `fit` wait for seconds.
    options = tf.data.Options()
    options.autotune.enabled = False
    return result.with_options(options)


def is_on_cpu(tensor: tf.Tensor) -> bool:
    """Whether a tensor's products are made by the processor.

    Args:
        tensor: Any, a traced one as well.
    """
    devices = tf.config.list_logical_devices()
    return not any(d.device_type in ("GPU", "TPU") for d in devices)


def device_names() -> list[str]:
    """Names of the devices, for people to read."""
    return [device.name for device in tf.config.list_logical_devices()]


def cache_compilations(folder: Path) -> None:
    """Does nothing: there is nothing compiled that a file could hold."""


def seed_step(seed: int) -> None:
    """Does nothing: dropout's seeds are variables of the model."""


def write(cache: tf.Tensor, index: Any, new: tf.Tensor) -> tf.Tensor:
    """A cache with new positions: see `keras_iris.backend.jax.write`."""
    return keras.ops.slice_update(cache, (0, 0, index, 0), new)


def write_rows(array: tf.Tensor, rows: tf.Tensor, new: tf.Tensor) -> tf.Tensor:
    """An array with other rows: see `keras_iris.backend.jax.write_rows`."""
    groups = tf.broadcast_to(tf.range(rows.shape[0])[:, None], rows.shape)
    places = tf.stack([groups, rows], axis=-1)
    return tf.tensor_scatter_nd_update(array, places, new)


def map_parts(
    function: Callable[[Any], tf.Tensor], x: Any, size: int
) -> tf.Tensor:
    """A function of a batch's parts: see `keras_iris.backend.jax.map_parts`."""
    num_rows = tf.shape(keras.tree.flatten(x)[0])[0]

    parts = tf.map_fn(
        lambda start: function(_take(x, start, size, num_rows)[0]),
        tf.range(0, num_rows, size),
        parallel_iterations=1,
        fn_output_signature=tf.float32,
    )
    return tf.reshape(parts, (-1, *parts.shape[2:]))[:num_rows]


class Trainer(keras.Model):
    """A `keras.Model` with the micro-batched train step.

    See `keras_iris.backend.jax.Trainer` for how it adds up gradients.
    """

    _num_responses: Any = None  # in the last `fit`, a shape of one dimension

    def device_scope(self) -> Any:
        """Where the optimizer makes its variables: that of the strategy."""
        return self.distribute_strategy.scope()

    def check_devices(self) -> None:
        """Refuses what replicas of a `tf.distribute` strategy can't train."""
        refuse_distribution()
        size, count = self.micro_batch_size or 0, self._num_replicas
        strategy = self.distribute_strategy
        is_mirrored = isinstance(strategy, tf.distribute.MirroredStrategy)
        if count > 1 and (not is_mirrored or size % count):
            raise ValueError(
                f"{count} replicas need MirroredStrategy, and micro-batches of "
                f"a multiple of {count}. Received: {type(strategy).__name__}, "
                f"micro_batch_size={size}."
            )

    @functools.wraps(keras.Model.fit)
    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Keras' own; another number of responses is traced anew.

        Or the trace of any number takes the place of that of one.
        """
        tensor = keras.tree.flatten(getattr(x, "element_spec", x))[0]
        num_responses = getattr(tensor, "shape", (None, None))[1:2]
        if num_responses != self._num_responses:
            self.train_function = None
        self._num_responses = num_responses
        return super().fit(x, *args, **kwargs)

    @property
    def _num_replicas(self) -> int:
        return int(self.distribute_strategy.num_replicas_in_sync)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `keras.Model.compile`; collectives aren't for XLA on CPUs."""
        if self._num_replicas > 1:
            kwargs["jit_compile"] = False
        super().compile(*args, **kwargs)
        optimizer = self.optimizer
        while self._num_replicas > 1 and optimizer is not None:
            # The step has added them up already, before they are clipped.
            optimizer._all_reduce_sum_gradients = list
            optimizer = getattr(optimizer, "inner_optimizer", None)

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        # Keras (3.15) would take the mean of the replicas' masks.
        if self._num_replicas > 1:
            with self.device_scope():
                self._symbolic_build()

    def train_step(self, data: Any) -> dict[str, Any]:
        """One optimizer step, with the exact gradient of the whole batch.

        Under a `tf.distribute.MirroredStrategy` each replica has some of its
        rows.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        size = self.micro_batch_size
        num_rows = None if y is None else y.shape[0]  # None: not a fixed one
        is_whole = not size or (num_rows is not None and size >= num_rows)
        variables = self.trainable_weights
        # Without `y` the loss raises.
        if y is None or (is_whole and self._num_replicas == 1):
            whole = x, y, sample_weight
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self._whole_loss(whole, y_pred)
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, variables)
        else:
            whole = gathered(x, y, sample_weight)
            loss, y_pred, gradients = self._gradients_of_parts(x, whole)
        # Of an embedding's rows there may be several gradients.
        dense = [g if g is None else tf.convert_to_tensor(g) for g in gradients]
        norm = gradient_norm(dense, self.optimizer.scale_loss)
        self.recent.gradient_norm.assign(norm)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self._log(whole, y_pred, loss)

    def _gradients_of_parts(
        self, x: Any, whole: Any
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Loss, log-probs and gradients of the batch of all replicas."""
        if has_routers(self):
            return self._two_passes(x, whole)
        y_pred, gradients = self._micro_batched_gradients(x, *whole[1:])
        # What the loss depends on beside them: weight regularisers.
        with tf.GradientTape() as tape:
            loss = self._whole_loss(whole, y_pred)
            scaled = self.optimizer.scale_loss(loss)
        direct = tape.gradient(scaled, self.trainable_weights)
        gradients = [
            g if d is None else g + d
            for g, d in zip(gradients, direct, strict=True)
        ]
        return loss, y_pred, gradients

    def test_step(self, data: Any) -> dict[str, Any]:
        """Keras' own; with replicas, the loss is that of the whole batch."""
        if self._num_replicas == 1:
            return super().test_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred = gather(self(x, training=False))
        whole = gathered(x, y, sample_weight)
        return self._log(
            whole, y_pred, self._whole_loss(whole, y_pred, training=False)
        )

    def _whole_loss(
        self, batch: Any, y_pred: tf.Tensor, *, training: bool = True
    ) -> tf.Tensor:
        """The loss of a whole batch, and of what else there is."""
        x, y, sample_weight = batch
        # The hook of Keras' own step (3.15).
        return self._compute_loss(
            x=x,
            y=y,
            y_pred=y_pred,
            sample_weight=sample_weight,
            training=training,
        )

    def _aggregate_additional_loss(self, loss: tf.Tensor) -> tf.Tensor:
        # Keras (3.15) takes each replica's for its share of the whole.
        loss = super()._aggregate_additional_loss(loss)
        return loss * self._num_replicas if self._num_replicas > 1 else loss

    def _log(
        self, batch: Any, y_pred: tf.Tensor, loss: tf.Tensor
    ) -> dict[str, Any]:
        """Updates all metrics and returns their results."""
        x, y, sample_weight = batch
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(y)[0])
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _two_passes(
        self, x: Any, batch: Any
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Loss, log-probs and gradients: see the one of JAX."""
        # TensorFlow's own: of Keras' it makes no zeros.
        variables = [variable.value for variable in self.trainable_weights]
        replica = tf.distribute.get_replica_context()
        num_rows, num_responses = tf.unstack(tf.shape(x["token_ids"])[:2])
        size = self._local_size(num_rows)
        starts = tf.range(0, num_rows, size)

        def call(start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            part, _, is_row = _take(x, start, size, num_rows)
            row_weights = tf.repeat(is_row[:, None], num_responses, 1)
            with router_sums(self, row_weights):
                y_pred = self(part, training=True)
            sums, others = split_sums(self.losses)
            refuse_layer_losses(self, others)
            self._clear_losses()
            return y_pred, sums

        # The second pass draws the same dropout.
        seeds = [v for v in self.variables if v.name == "seed_generator_state"]
        before = [tf.identity(seed.value) for seed in seeds]
        y_pred, sums = tf.map_fn(
            call,
            starts,
            parallel_iterations=1,
            fn_output_signature=(tf.float32, tf.float32),
        )
        for seed, value in zip(seeds, before, strict=True):
            seed.assign(value)
        y_pred = gather(tf.reshape(y_pred, (-1, y_pred.shape[-1]))[:num_rows])
        sums = _add_up(tf.reduce_sum(sums, axis=0))
        num_parts = tf.size(starts) * self._num_replicas
        with tf.GradientTape() as tape:
            tape.watch([y_pred, sums])
            loss = self._whole_loss(batch, y_pred)
            loss = loss + router_loss(sums, num_parts)
            scaled = self.optimizer.scale_loss(loss)
        d_pred, d_sums, *direct = tape.gradient(
            scaled, [y_pred, sums, *variables], unconnected_gradients="zero"
        )
        first = replica.replica_id_in_sync_group * num_rows
        d_pred = d_pred[first : first + num_rows]
        d_pred = tf.pad(d_pred, ((0, -num_rows % size), (0, 0)))

        def body(start: tf.Tensor, gradients: list[tf.Tensor]) -> Any:
            with tf.GradientTape() as tape:
                outputs = call(start)
            updates = tape.gradient(
                outputs,
                variables,
                output_gradients=(d_pred[start : start + size], d_sums),
                unconnected_gradients="zero",
            )
            return start + size, _add(gradients, updates)

        _, gradients = tf.while_loop(
            lambda start, _: start < num_rows,
            body,
            (
                tf.constant(0),
                [tf.zeros(v.shape, _sum_dtype(v.dtype)) for v in variables],
            ),
            parallel_iterations=1,
        )
        return loss, y_pred, _add(_add_up(gradients), direct)

    def _micro_batched_gradients(
        self, x: Any, y: tf.Tensor, sample_weight: tf.Tensor | None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The log-probs and the (scaled) gradients of the whole batch."""
        share = shares(sample_weight, y)
        replica = tf.distribute.get_replica_context()
        if self._num_replicas > 1:
            num_rows = tf.shape(y)[0] // self._num_replicas
            first = replica.replica_id_in_sync_group * num_rows
            y, share = (a[first : first + num_rows] for a in (y, share))
        sums: list[tf.Tensor] = []
        columns: dict[int, tf.Tensor] = {}
        for stream in self.loss.streams(y, x["token_ids"][..., 0]):
            # One after another, or TensorFlow runs both at once, and holds
            # the activations of two micro-batches.
            with tf.control_dependencies(sums):
                y_pred, gradients = self._accumulate(stream, x, y, share)
            if sums:
                gradients = [
                    s + g for s, g in zip(sums, gradients, strict=True)
                ]
            sums = gradients
            columns |= dict(
                zip(stream.columns, tf.unstack(y_pred, axis=1), strict=True)
            )
        y_pred = tf.stack([columns[i] for i in sorted(columns)], axis=1)
        return gather(y_pred), sums

    def _local_size(self, num_rows: tf.Tensor) -> Any:
        """Rows of a micro-batch in this replica, which has `num_rows`."""
        size = self.micro_batch_size
        return size // self._num_replicas if size else num_rows

    def _accumulate(
        self, stream: Stream, x: Any, y: tf.Tensor, share: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The log-probs of a term's responses, and its gradients.

        Micro-batch after micro-batch, never two at once. The last is filled
        with copies of the last row, as XLA needs one shape.
        """
        variables = [variable.value for variable in self.trainable_weights]
        num_rows, num_columns = tf.shape(y)[0], len(stream.columns)
        size = self._local_size(num_rows)
        if isinstance(size, int):
            size = stream.part_size(size, y.shape[0])

        def body(
            start: tf.Tensor,
            log_probs: tf.Tensor,
            gradients: list[tf.Tensor],
            total: tf.Tensor,
            shift: tf.Tensor,
        ) -> tuple[Any, ...]:
            (x_rows, y_rows, p), rows, is_row = _take(
                (x, y, share), start, size, num_rows
            )
            x_rows, y_rows = keras.tree.map_structure(
                lambda a: tf.gather(a, stream.columns, axis=1), (x_rows, y_rows)
            )
            with tf.GradientTape() as tape:
                y_pred = self(x_rows, training=True)
                refuse_layer_losses(self)
                objective, part, new_shift = stream.objective(
                    y_rows, y_pred, p * is_row, shift
                )
                scaled = self.optimizer.scale_loss(objective)
            updates = tape.gradient(
                scaled, variables, unconnected_gradients="zero"
            )
            shrink = tf.exp(shift - new_shift)
            return (
                start + size,
                tf.tensor_scatter_nd_update(log_probs, rows[:, None], y_pred),
                _add([shrink * g for g in gradients], updates),
                shrink * total + part,
                new_shift,
            )

        _, log_probs, gradients, total, shift = tf.while_loop(
            lambda start, *_: start < num_rows,
            body,
            (
                tf.constant(0),
                tf.zeros((num_rows, num_columns)),
                [tf.zeros(v.shape, _sum_dtype(v.dtype)) for v in variables],
                tf.constant(0.0),
                tf.constant(stream.first_shift),
            ),
            parallel_iterations=1,
        )
        if self._num_replicas > 1:
            # The sums of other replicas count from other exponents.
            shrink = tf.exp(shift - tf.reduce_max(gather(shift[None])))
            total, *gradients = _add_up(
                [total * shrink, *(g * shrink for g in gradients)]
            )
        return log_probs, [
            tf.math.divide_no_nan(g, tf.cast(total, g.dtype)) for g in gradients
        ]


def _add_up(tensors: Any) -> Any:
    """The sums of tensors over all replicas."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return tensors
    return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def _take(
    x: Any, start: tf.Tensor, size: int, num_rows: tf.Tensor
) -> tuple[Any, tf.Tensor, tf.Tensor]:
    """Rows of a batch, the last one again where there are no more.

    Returns:
        The rows of each tensor of `x`, their numbers, and 1 for those that
        are rows of their own.
    """
    rows = start + tf.range(size)
    is_row = tf.cast(rows < num_rows, "float32")
    rows = tf.minimum(rows, num_rows - 1)
    part = keras.tree.map_structure(lambda a: tf.gather(a, rows), x)
    return part, rows, is_row


def _add(
    sums: list[tf.Tensor], updates: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Adds gradients, rows of an embedding as well."""
    return [
        g + tf.cast(tf.convert_to_tensor(u), g.dtype)
        for g, u in zip(sums, updates, strict=True)
    ]


def _sum_dtype(dtype: Any) -> tf.DType:
    """Half-precision gradients are summed in float32."""
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.size == 2 else dtype
