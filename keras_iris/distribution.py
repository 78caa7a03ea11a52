"""Sharding over devices, and what a run takes of memory, disk and time."""

import dataclasses
import math
from typing import Any

import keras

_BATCH = "batch"
_DECODER_LAYER_OUTPUT = r".*(transformer_layer|decoder_block)_\d+/output"
# Smaller variables are whole on every device.
_MIN_SHARDED_NUMBERS = 1024

_MASTER_BYTES = 4  # of a number that is trained, of its gradient, of a slot
_COMPUTE_BYTES = 2  # bfloat16
_ID_BYTES = 4
_QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}
_LOGITS_BYTES = 3 * 2**27  # tiles of logits, a block of the head's gradient


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What a self-play run takes, from its sizes: estimates, not measured.

    Without LoRA all weights are trained, in mixed_bfloat16; with LoRA the
    base is bfloat16 or quantized, the adapters are float32. Each layer's
    activations are computed again in the backward pass.

    Args:
        config: The decoder's sizes, as `keras_iris.hub.inspect` gives them.
        num_prompts: Prompts of an iteration.
        prompt_length: Mean tokens of a prompt.
        response_length: Mean tokens of an annotated response.
        new_tokens: Tokens of a synthetic response.
        max_length: Most tokens of prompt and response.
        iterations: Number of iterations.
        epochs: Epochs of an iteration.
        micro_batch_size: Pairs of a forward and backward pass.
        generation_batch_size: Prompts that are answered together.
        lora_rank: Rank of the adapters of queries and values, or `None`.
        quantize: `"int8"`, `"int4"` or `None`.
        num_devices: Devices that weights and batches are cut over.
        optimizer_slots: Numbers that the optimizer keeps for each trained one.
        num_streams: Terms of the loss, `len(loss.streams())`.
    """

    config: Any
    num_prompts: int
    prompt_length: float
    response_length: float
    new_tokens: int
    max_length: int
    iterations: int
    epochs: int
    micro_batch_size: int
    generation_batch_size: int
    lora_rank: int | None = None
    quantize: str | None = None
    num_devices: int = 1
    optimizer_slots: int = 1
    num_streams: int = 2

    @property
    def num_weights(self) -> int:
        """Numbers of the model itself."""
        return sum(map(math.prod, self.config.weight_shapes().values()))

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        if self.lora_rank is None:
            return self.num_weights
        # (inputs, rank) and (rank, outputs)
        adapted = ("q_proj.weight", "v_proj.weight")
        shapes = self.config.weight_shapes().items()
        sizes = (sum(shape) for name, shape in shapes if name.endswith(adapted))
        return int(self.lora_rank * sum(sizes))

    def memory(self) -> dict[str, float]:
        """Bytes on each device.

        Returns:
            Bytes by name; `"training"` and `"generation"` are sums, and the
            larger is what a device needs.
        """
        trained = _MASTER_BYTES * self.num_trained
        always = {
            "weights": self._weights_bytes(),
            "optimizer": trained * self.optimizer_slots,
        }
        if self.lora_rank is None:
            always["bfloat16 copies"] = _COMPUTE_BYTES * self.num_weights
        training = {
            "gradients": trained,
            "gradients of earlier terms": trained * (self.num_streams > 1),
            "activations": self._activation_bytes(),
        }
        cache = {"key-value cache": self._cache_bytes()}
        parts = {
            name: size / self.num_devices
            for name, size in (always | training | cache).items()
        }
        parts["logits"] = _LOGITS_BYTES
        return parts | {
            "training": sum(parts[n] for n in (*always, *training, "logits")),
            "generation": sum(parts[name] for name in always | cache),
        }

    def disk(self, *, needs_folder: bool) -> dict[str, float]:
        """Bytes of the run's folder, by name.

        Args:
            needs_folder: Whether the engine reads exported weights.
        """
        trained = _MASTER_BYTES * self.num_trained
        export = _COMPUTE_BYTES * self.num_weights
        length = self.prompt_length + self.response_length
        synthetic = self.iterations * self.new_tokens
        return {
            # The latest, those of two iterations' starts, and a new one while
            # it replaces another.
            "checkpoints": 4 * trained * (1 + self.optimizer_slots),
            "engine's model": 2 * export * needs_folder,
            "trained model": export,
            "tokens": _ID_BYTES * self.num_prompts * (length + synthetic),
        }

    def seconds(
        self, *, flops_per_second: float, bytes_per_second: float
    ) -> dict[str, float]:
        """Time of the whole run on all devices, by its parts.

        2 operations a matrix weight and token forward, 4 backward (2 with
        LoRA), 2 to compute activations again; attention, communication,
        compilation and padding aren't counted. A decoding step takes at least
        the time of reading the weights.

        Args:
            flops_per_second: Floating-point operations that one device does,
                not its peak.
            bytes_per_second: Bytes that it reads from its memory.
        """
        config = self.config
        weights = self.num_weights
        if not config.tie_word_embeddings:  # a table that is only read
            weights -= config.vocabulary_size * config.hidden_size
        forward = 2 * weights / (flops_per_second * self.num_devices)
        reading = self._weights_bytes() / (bytes_per_second * self.num_devices)
        answers = self.num_prompts * self.new_tokens
        pairs = self.num_prompts * (
            2 * self.prompt_length + self.response_length + self.new_tokens
        )
        passes = 1 + 1 + (2 if self.lora_rank is None else 1)
        once = {
            "generation": forward * self.num_prompts * self.prompt_length
            + max(forward, reading / self.generation_batch_size) * answers,
            "scoring": forward * pairs,
            "training": forward * pairs * passes * self.epochs,
        }
        return {name: self.iterations * time for name, time in once.items()}

    def _weights_bytes(self) -> float:
        if self.lora_rank is None:
            return _MASTER_BYTES * self.num_weights
        matrices = sum(
            math.prod(shape)
            for name, shape in self.config.weight_shapes().items()
            if name.endswith("_proj.weight")
        )
        size = _QUANTIZED_BYTES.get(self.quantize or "", _COMPUTE_BYTES)
        base = size * matrices + _COMPUTE_BYTES * (self.num_weights - matrices)
        return base + _MASTER_BYTES * self.num_trained

    def _activation_bytes(self) -> float:
        """Each layer's input, and one layer with its gradients."""
        config = self.config
        rows = 2 * self.micro_batch_size
        queries = config.num_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        layer = (  # normalised, attention's, feed-forward's
            2 * config.hidden_size
            + 2 * (queries + keys)
            + 4 * config.intermediate_size
        )
        token = config.num_layers * config.hidden_size + 2 * layer
        # Where no fused attention is used: float32, and its bfloat16 copy.
        scores = config.num_heads * self.max_length**2
        numbers = _COMPUTE_BYTES * self.max_length * token
        return rows * (numbers + (_MASTER_BYTES + _COMPUTE_BYTES) * scores)

    def _cache_bytes(self) -> float:
        config = self.config
        keys = config.num_key_value_heads * config.head_dim
        token = 2 * config.num_layers * keys * _COMPUTE_BYTES
        return float(self.generation_batch_size * self.max_length * token)
