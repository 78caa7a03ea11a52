"""Low-rank adapters beside the linear layers of decoder blocks.

An adapted layer computes `y + alpha / rank * (x A) B`, where `y` is its own
output for the input `x`, whatever its kernel is kept in. `A` has the shape
`(inputs, rank)` and `B` the shape `(rank, outputs)`, inputs and outputs
counted over all of the layer's axes, so that heads share a rank (Hu et al.
2021, https://arxiv.org/abs/2106.09685, equation 3).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import ops

Targets = Sequence[str] | Literal["all"]

# What the layers of KerasHub's decoder blocks are for, by their names.
LAYER_ROLES = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "output",
    "feedforward_gate_dense": "gate",
    "feedforward_intermediate_dense": "up",
    "feedforward_output_dense": "down",
    # Gemma
    "ffw_gating": "gate",
    "ffw_gating_2": "up",
    "ffw_linear": "down",
    # SmolLM3
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
ROLES = tuple(dict.fromkeys(LAYER_ROLES.values()))


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which adapters a model has.

    Args:
        rank: Columns of `A` and rows of `B`.
        alpha: The adapters' outputs are multiplied by `alpha / rank`.
            Defaults to twice the rank.
        targets: Roles of the layers that are adapted, out of `"query"`,
            `"key"`, `"value"`, `"output"`, `"gate"`, `"up"` and `"down"`, or
            `"all"` for every linear layer of the decoder blocks.

    Raises:
        ValueError: One of them is out of range.
    """

    rank: int
    alpha: float | None = None
    targets: Targets = ("query", "value")

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:  # True is an int
            raise ValueError(
                "LoRA's rank has to be an integer of at least 1. Received: "
                f"{self.rank!r}. `keras_iris.load` without `lora_rank` trains "
                "all weights."
            )
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ValueError(
                "LoRA's alpha has to be a number above 0, or None for twice "
                f"the rank. Received: {alpha!r}"
            )
        object.__setattr__(self, "alpha", float(alpha))
        if self.targets == "all":
            return
        targets = self.targets
        if isinstance(targets, str) or not targets or set(targets) - {*ROLES}:
            raise ValueError(
                f"LoRA's targets have to be 'all' or some of {ROLES}. "
                f"Received: {targets!r}"
            )
        ordered = tuple(role for role in ROLES if role in targets)
        object.__setattr__(self, "targets", ordered)

    def get_config(self) -> dict[str, Any]:
        """The arguments, as JSON knows them."""
        return {**dataclasses.asdict(self), "targets": list(self.targets)}


class LoraLayer(keras.layers.Layer):
    """What `add_lora` makes of a linear layer, beside its own class.

    Attributes:
        role: What the layer is for.
        alpha: As in `Lora`.
        lora_a: `A`, float32 variable of shape `(inputs, rank)`.
        lora_b: `B`, float32 variable of shape `(rank, outputs)`.
    """

    role: str
    alpha: float
    lora_a: keras.Variable
    lora_b: keras.Variable

    @property
    def lora_scale(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.alpha / int(self.lora_a.shape[1])

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The layer's output and its adapter's."""
        return self._beside(super().call(inputs, training=training), inputs)

    def quantized_call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The same where the layer is quantized: Keras calls this instead."""
        outputs = super().quantized_call(inputs, *args, **kwargs)
        return self._beside(outputs, inputs)

    def _beside(self, outputs: Any, inputs: Any) -> Any:
        num_axes = len(_input_axes(self))
        if num_axes > 1:
            shape = (*ops.shape(inputs)[:-num_axes], -1)
            inputs = ops.reshape(inputs, shape)
        # Variables are float32 and products of the layer's dtype.
        low = ops.matmul(inputs, ops.cast(self.lora_a, inputs.dtype))
        low = ops.matmul(
            low * self.lora_scale, ops.cast(self.lora_b, inputs.dtype)
        )
        low = ops.reshape(low, ops.shape(outputs))
        return outputs + ops.cast(low, outputs.dtype)

    def save_own_variables(self, store: Any) -> None:
        """Saves the layer's own variables as Keras does, and the adapter."""
        super().save_own_variables(store)
        store["lora_a"], store["lora_b"] = self.lora_a, self.lora_b

    def load_own_variables(self, store: Any) -> None:
        """Loads what `save_own_variables` saved."""
        super().load_own_variables(store)  # which counts the variables
        self.lora_a.assign(store["lora_a"])
        self.lora_b.assign(store["lora_b"])


class LoraDense(LoraLayer, keras.layers.Dense):
    """A `Dense` layer with an adapter."""


class LoraEinsumDense(LoraLayer, keras.layers.EinsumDense):
    """An `EinsumDense` layer with an adapter."""


_ADAPTED = {
    keras.layers.Dense: LoraDense,
    keras.layers.EinsumDense: LoraEinsumDense,
}


def add_lora(backbone: keras.Model, lora: Lora) -> None:
    """Adds adapters to a backbone and freezes everything else.

    The layers stay the same objects, with the same variables and two more
    each, so that whatever calls them computes with the adapters. `A` starts
    as in the `peft` library, uniform in `1 / sqrt(inputs)`, with the same
    values in every process, and `B` as zeros.

    Quantize before: Keras quantizes its own classes only.

    Args:
        backbone: A built KerasHub backbone with `transformer_layers`.
        lora: Which adapters.

    Raises:
        ValueError: It has adapters already, lacks a target, or one that
            can't be adapted. Then it's unchanged.
    """
    layers = [
        layer
        for block in getattr(backbone, "transformer_layers", ())
        for layer in _find_targets(block, lora.targets)
    ]
    if not layers:
        raise ValueError(
            "LoRA needs a KerasHub backbone with `transformer_layers`. "
            f"Received: {type(backbone).__name__}"
        )
    matrices = [_matrix_shape(layer) for layer in layers]
    for variable in backbone.variables:
        variable.trainable = False
    for seed, (layer, matrix) in enumerate(zip(layers, matrices, strict=True)):
        _adapt(layer, matrix, lora, seed)


def find_lora(backbone: keras.Model) -> Lora | None:
    """The adapters that `add_lora` added, if any.

    Args:
        backbone: A KerasHub backbone.
    """
    layers = lora_layers(backbone)
    if not layers:
        return None
    rank = int(layers[0].lora_a.shape[1])
    return Lora(rank, layers[0].alpha, [layer.role for layer in layers])


def lora_layers(backbone: keras.Model) -> list[LoraLayer]:
    """The layers with an adapter, in the order of the model.

    Args:
        backbone: A KerasHub backbone.
    """
    # Keras has no public way to the layers of layers.
    layers = backbone._flatten_layers()
    return [layer for layer in layers if isinstance(layer, LoraLayer)]


def role_of(layer: keras.layers.Layer) -> str | None:
    """What a layer of a decoder block is for, `None` if it isn't known."""
    return LAYER_ROLES.get(layer.name)


def _find_targets(
    block: keras.layers.Layer, targets: Targets
) -> list[keras.layers.Layer]:
    """The layers of a decoder block that are to be adapted."""
    roles = ROLES if targets == "all" else targets
    parts = [part for part in block._flatten_layers() if part is not block]
    chosen = [part for part in parts if role_of(part) in roles]
    others = [
        # Vectors are norms and biases.
        variable.path
        for part in parts
        if part not in chosen
        for variable in part._trainable_variables
        if len(variable.shape) > 1
    ]
    if targets == "all" and others:
        raise ValueError(
            f"LoRA's targets 'all' can't adapt {others[0]!r}, which is no "
            f"layer out of {ROLES}. Name the targets that are to be adapted."
        )
    found = {role_of(part) for part in chosen}
    if targets != "all" and found != set(targets):
        raise ValueError(
            f"LoRA's targets are {targets}, and {block.path!r} has no layers "
            f"for {sorted(set(targets) - found)}. Leave them out."
        )
    return chosen


def _input_axes(layer: keras.layers.Layer) -> list[int]:
    """The axes of a layer's kernel that it sums over."""
    if isinstance(layer, keras.layers.Dense):
        return [0]
    inputs, kernel, _ = layer.equation.replace("->", ",").split(",")
    return [i for i, axis in enumerate(kernel) if axis in inputs]


def _matrix_shape(layer: keras.layers.Layer) -> tuple[int, int]:
    """A layer as a matrix: its numbers of inputs and outputs.

    Raises:
        ValueError: It isn't one of the last axes, or more than that.
    """
    if isinstance(layer, LoraLayer):
        raise ValueError(
            f"{layer.path!r} has an adapter already. Load the model again."
        )
    is_linear = (
        type(layer) in _ADAPTED and layer.activation is keras.activations.linear
    )
    if is_linear and isinstance(layer, keras.layers.EinsumDense):
        inputs, kernel, outputs = layer.equation.replace("->", ",").split(",")
        summed = "".join(axis for axis in kernel if axis in inputs)
        rest = "".join(axis for axis in kernel if axis not in inputs)
        is_linear = inputs.endswith(summed) and outputs.endswith(rest)
    if not is_linear:
        raise ValueError(
            f"LoRA can't adapt {layer.path!r}, a {type(layer).__name__} that "
            "isn't a product with one matrix. Leave out the target "
            f"{role_of(layer)!r}."
        )
    shape = tuple(layer.kernel.shape)  # int4 packs the variable itself
    num_inputs = math.prod(shape[i] for i in _input_axes(layer))
    return num_inputs, math.prod(shape) // num_inputs


def _adapt(layer: Any, matrix: tuple[int, int], lora: Lora, seed: int) -> None:
    """Makes a layer a `LoraLayer`."""
    num_inputs, num_outputs = matrix
    start = keras.initializers.VarianceScaling(
        scale=1 / 3, mode="fan_in", distribution="uniform", seed=seed
    )
    layer.__class__ = _ADAPTED[type(layer)]
    layer.role, layer.alpha = role_of(layer), lora.alpha
    options = dict(dtype="float32", autocast=False)
    layer._tracker.unlock()  # as Keras' own `enable_lora` does
    layer.lora_a = layer.add_weight(
        name="lora_a",
        shape=(num_inputs, lora.rank),
        initializer=start,
        **options,
    )
    layer.lora_b = layer.add_weight(
        name="lora_b",
        shape=(lora.rank, num_outputs),
        initializer="zeros",
        **options,
    )
    layer._tracker.lock()
