"""Sharding over devices."""

import math

import keras

_BATCH = "batch"
_DECODER_LAYER_OUTPUT = r".*(transformer_layer|decoder_block)_\d+/output"
# Smaller variables are whole on every device.
_MIN_SHARDED_NUMBERS = 1024


class ShardedParallel(keras.distribution.ModelParallel):
    """Cuts batches and variables over devices, whatever the decoder (FSDP).

    Each matrix is cut along the largest of its dimensions that the number of
    devices divides, so that weights, gradients and optimizer state take one
    share each; the outputs of decoder layers stay cut along the batch.
    KerasHub 0.32's own layout maps leave LoRA adapters and untied output
    layers whole, fail where devices don't divide the heads, and there is none
    for Mistral.

    Make it current with `keras.distribution.set_distribution` before the
    model is loaded. Batches, micro-batches and the batches of a `KerasEngine`
    have to be multiples of the number of devices.

    Args:
        num_devices: The first so many of `keras.distribution.list_devices()`;
            by default all.

    Raises:
        ValueError: Keras doesn't run on JAX, or there are fewer devices.
    """

    def __init__(self, num_devices: int | None = None) -> None:
        backend = keras.backend.backend()
        if backend != "jax":
            raise ValueError(
                f"Sharding needs JAX, Keras runs on {backend!r}. Set "
                "KERAS_BACKEND=jax, or train on one device."
            )
        available = keras.distribution.list_devices()
        if num_devices is None:
            num_devices = len(available)
        if not 1 <= num_devices <= len(available):
            raise ValueError(
                f"`num_devices` has to be from 1 to {len(available)}, which "
                f"there are: {available}. Received: {num_devices}"
            )
        devices = available[:num_devices]
        mesh = keras.distribution.DeviceMesh((num_devices,), [_BATCH], devices)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[_DECODER_LAYER_OUTPUT] = (_BATCH, None, None)
        super().__init__(layout_map=layouts, batch_dim_name=_BATCH)

    def get_variable_layout(
        self, variable: keras.Variable
    ) -> keras.distribution.TensorLayout:
        """The layout of a variable, which Keras asks for."""
        layout = super().get_variable_layout(variable)
        if any(layout.axes):
            return layout
        axes = _shard_axes(tuple(variable.shape), self.num_model_replicas)
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def _shard_axes(shape: tuple[int, ...], num_devices: int) -> list[str | None]:
    """The mesh axis of each dimension."""
    axes: list[str | None] = [None] * len(shape)
    divisible = [i for i, size in enumerate(shape) if size % num_devices == 0]
    is_large = math.prod(shape) >= _MIN_SHARDED_NUMBERS
    if len(shape) >= 2 and is_large and divisible:
        axes[max(divisible, key=lambda i: shape[i])] = _BATCH
    return axes
