"""The train step of `SelfPlayModel` on TensorFlow."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

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
from keras_iris.data import PairDataset
from keras_iris.losses.stream import Stream, shares


def prepare_remat() -> None:
    """Switches a pass of Grappler off, in the whole process.

    In some traces it (2.21) lets the optimizer write a variable before a
    rematerialised layer has read it: the gradient is wrong.
    """
    options = {"dependency_optimization": False}
    tf.config.optimizer.set_experimental_options(options)


def dataset(batches: PairDataset) -> tf.data.Dataset:
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


def seed_step(seed: int) -> None:
    """Does nothing: dropout's seeds are variables of the model."""


def write(cache: tf.Tensor, index: Any, new: tf.Tensor) -> tf.Tensor:
    """A cache with new positions: see `keras_iris.backend.jax.write`."""
    return keras.ops.slice_update(cache, (0, 0, index, 0), new)


def map_parts(
    function: Callable[[Any], tf.Tensor], x: Any, size: int
) -> tf.Tensor:
    """A function of a batch's parts: see `keras_iris.backend.jax.map_parts`."""
    num_rows = tf.shape(keras.tree.flatten(x)[0])[0]

    def part(start: tf.Tensor) -> tf.Tensor:
        rows = tf.minimum(start + tf.range(size), num_rows - 1)
        return function(
            keras.tree.map_structure(lambda a: tf.gather(a, rows), x)
        )

    parts = tf.map_fn(
        part,
        tf.range(0, num_rows, size),
        parallel_iterations=1,
        fn_output_signature=tf.float32,
    )
    return tf.reshape(parts, (-1, *parts.shape[2:]))[:num_rows]


class Trainer(keras.Model):
    """A `keras.Model` with the micro-batched train step.

    See `keras_iris.backend.jax.Trainer` for how it adds up gradients.
    """

    def check_devices(self) -> None:
        """Refuses strategies whose replicas would normalise on their own."""
        if self.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "The loss is that of the whole batch, which the replicas of a "
                "`tf.distribute` strategy don't see. Received: "
                f"{type(self.distribute_strategy).__name__} with "
                f"{self.distribute_strategy.num_replicas_in_sync} replicas. "
                "Use one device, or JAX with keras.distribution."
            )
        refuse_distribution()

    def train_step(self, data: Any) -> dict[str, Any]:
        """One optimizer step, with the exact gradient of the whole batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if y is None or not self.micro_batch_size:  # without, the loss raises
            return super().train_step(data)
        num_rows = y.shape[0]  # None where the data has no fixed batch size
        if num_rows is not None and self.micro_batch_size >= num_rows:
            return super().train_step(data)

        def batch_loss(y_pred: tf.Tensor) -> tf.Tensor:
            # `_compute_loss` is the hook of Keras' own step (3.15).
            return self._compute_loss(
                x=x,
                y=y,
                y_pred=y_pred,
                sample_weight=sample_weight,
                training=True,
            )

        variables = self.trainable_weights
        if has_routers(self):
            loss, y_pred, gradients = self._two_passes(x, batch_loss)
        else:
            y_pred, gradients = self._micro_batched_gradients(
                x, y, sample_weight
            )
            # What the loss depends on beside them: weight regularisers.
            with tf.GradientTape() as tape:
                loss = batch_loss(y_pred)
                scaled = self.optimizer.scale_loss(loss)
            direct = tape.gradient(scaled, variables)
            gradients = [
                g if d is None else g + d
                for g, d in zip(gradients, direct, strict=True)
            ]
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self._loss_tracker.update_state(loss, sample_weight=tf.shape(y)[0])
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _two_passes(
        self, x: Any, batch_loss: Callable[[tf.Tensor], tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor]]:
        """Loss, log-probs and gradients: see the one of JAX."""
        # TensorFlow's own: of Keras' it makes no zeros.
        variables = [variable.value for variable in self.trainable_weights]
        size = self.micro_batch_size
        num_rows, num_responses = tf.unstack(tf.shape(x["token_ids"])[:2])
        starts = tf.range(0, num_rows, size)

        def call(start: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            rows = start + tf.range(size)
            row_weights = tf.cast(rows < num_rows, "float32")[:, None]
            rows = tf.minimum(rows, num_rows - 1)
            part = keras.tree.map_structure(lambda a: tf.gather(a, rows), x)
            with router_sums(self, tf.repeat(row_weights, num_responses, 1)):
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
        y_pred = tf.reshape(y_pred, (-1, y_pred.shape[-1]))[:num_rows]
        sums = tf.reduce_sum(sums, axis=0)
        with tf.GradientTape() as tape:
            tape.watch([y_pred, sums])
            loss = batch_loss(y_pred) + router_loss(sums, tf.size(starts))
            scaled = self.optimizer.scale_loss(loss)
        d_pred, d_sums, *gradients = tape.gradient(
            scaled, [y_pred, sums, *variables], unconnected_gradients="zero"
        )
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
                [tf.cast(g, _sum_dtype(g.dtype)) for g in gradients],
            ),
            parallel_iterations=1,
        )
        return loss, y_pred, gradients

    def _micro_batched_gradients(
        self, x: Any, y: tf.Tensor, sample_weight: tf.Tensor | None
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The log-probs and the (scaled) gradients of the whole batch."""
        share = shares(sample_weight, y)
        sums: list[tf.Tensor] = []
        columns: dict[int, tf.Tensor] = {}
        for stream in self.loss.streams():
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
        return tf.stack([columns[0], columns[1]], axis=1), sums

    def _accumulate(
        self, stream: Stream, x: Any, y: tf.Tensor, share: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The log-probs of a term's responses, and its gradients.

        Micro-batch after micro-batch, never two at once. The last is filled
        with copies of the last row, as XLA needs one shape.
        """
        variables = [variable.value for variable in self.trainable_weights]
        size = stream.part_size(self.micro_batch_size, y.shape[0])
        num_rows, num_columns = tf.shape(y)[0], len(stream.columns)

        def body(
            start: tf.Tensor,
            log_probs: tf.Tensor,
            gradients: list[tf.Tensor],
            total: tf.Tensor,
            shift: tf.Tensor,
        ) -> tuple[Any, ...]:
            rows = start + tf.range(size)
            is_row = tf.cast(rows < num_rows, "float32")
            rows = tf.minimum(rows, num_rows - 1)
            x_rows, y_rows = keras.tree.map_structure(
                lambda a: tf.gather(tf.gather(a, rows), stream.columns, axis=1),
                (x, y),
            )
            with tf.GradientTape() as tape:
                y_pred = self(x_rows, training=True)
                refuse_layer_losses(self)
                objective, part, new_shift = stream.objective(
                    y_rows, y_pred, tf.gather(share, rows) * is_row, shift
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

        _, log_probs, gradients, total, _ = tf.while_loop(
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
        return log_probs, [
            tf.math.divide_no_nan(g, tf.cast(total, g.dtype)) for g in gradients
        ]


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
