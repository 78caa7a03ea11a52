"""Where each weight of a checkpoint lives in KerasHub's model.

One table (`architecture_table`) serves loading and exporting.
"""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.decoder_config import DecoderConfig, Entry
from keras_iris.models.decoder_parts import part
from keras_iris.models.lora import LoraLayer


class Bank:
    """A variable that holds the matrices of all experts of a layer.

    It is of shape `(experts, inputs, outputs)`, with two matrices side by
    side in the last axis where gate and up projection are one.

    Args:
        variable: The variable.
        num_parts: How many weights of a checkpoint it holds.
    """

    def __init__(self, variable: keras.Variable, num_parts: int) -> None:
        self._variable = variable
        self._num_parts = num_parts
        self._count = 0
        self._values: np.ndarray | None = None

    def write(self, index: tuple[Any, ...], array: np.ndarray) -> None:
        """Sets a part; the variable is set once, with all of them."""
        if self._values is None:
            self._values = np.empty(self._variable.shape, array.dtype)
        self._values[index] = array
        if self._is_last():
            self._variable.assign(self._values.astype(np.float32))
            self._values = None

    def read(self, index: tuple[Any, ...]) -> np.ndarray:
        """A part; the variable is read once for all of them."""
        if self._values is None:
            self._values = _to_numpy(self._variable)
        array = self._values[index]
        if self._is_last():
            self._values = None
        return array

    def _is_last(self) -> bool:
        self._count = (self._count + 1) % self._num_parts
        return self._count == 0


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight: a name and shape in the checkpoint, a layer in the model.

    Attributes:
        name: The name in the checkpoint.
        shape: The shape in the checkpoint.
        layer: The Keras layer, or a `Bank` of experts.
        attribute: `"kernel"`, `"bias"`, `"scale"`, `"embeddings"` or
            `"reverse_embeddings"`; of a bank, the part that this is.
    """

    name: str
    shape: tuple[int, ...]
    layer: Any
    attribute: Any

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def assign(self, array: np.ndarray) -> None:
        """Sets the layer's variable from the checkpoint's array."""
        if isinstance(self.layer, Bank):
            self.layer.write(self.attribute, array.T)
            return
        variable = getattr(self.layer, self.attribute)
        variable.assign(self._to_keras(array, tuple(variable.shape)))

    def read(self) -> np.ndarray:
        """The checkpoint's array, with LoRA merged and not quantized.

        Returns:
            A float32 array of shape `self.shape`.
        """
        if isinstance(self.layer, Bank):
            return self.layer.read(self.attribute).T
        if self.layer.quantization_mode and self.attribute == "kernel":
            return _read_by_calling(self.layer, self.shape)
        if self.layer.quantization_mode and "embeddings" in self.attribute:
            raise ValueError(
                f"The embedding {self.layer.path!r} is quantized and cannot "
                "be exported. Load the model with `keras_iris.load(..., "
                "quantize=...)`, which leaves embeddings in float."
            )
        variables = {v.name: v for v in self.layer.variables}
        array = self._from_keras(_to_numpy(variables[self.attribute]))
        if self.attribute == "kernel" and isinstance(self.layer, LoraLayer):
            layer = self.layer
            low = _to_numpy(layer.lora_a) @ _to_numpy(layer.lora_b)
            array = array + layer.lora_scale * low.T
        return array

    def _to_keras(
        self, array: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        array = array.astype(np.float32)
        if self._is_heads_first(shape):
            heads, hidden, head_dim = shape
            array = array.reshape(heads, head_dim, hidden)
            return array.transpose(0, 2, 1)
        if self.attribute in ("kernel", "reverse_embeddings"):
            array = array.T
        return array.reshape(shape)

    def _from_keras(self, array: np.ndarray) -> np.ndarray:
        if self._is_heads_first(array.shape):
            array = array.transpose(0, 2, 1)
        elif self.attribute in ("kernel", "reverse_embeddings"):
            return array.reshape(self.shape[::-1]).T
        return array.reshape(self.shape)

    def _is_heads_first(self, shape: tuple[int, ...]) -> bool:
        # Gemma's query, key and value: (heads, hidden, head_dim).
        if self.attribute != "kernel" or len(shape) != 3:
            return False
        return str(self.layer.equation).split(",")[1][1] == "d"


def list_weights(backbone: keras.Model, config: DecoderConfig) -> list[Weight]:
    """The weights of a backbone with this config, as a checkpoint has them."""
    row = ARCHITECTURES[config.model_type]
    embedding = backbone.token_embedding
    ends = {
        "embedding": (embedding, "embeddings"),
        "head": (embedding, "reverse_embeddings"),
        "final_norm": (getattr(backbone, row.final_norm), "scale"),
    }
    parts = row.parts
    banks: dict[str, Bank] = {}  # by the path of a variable
    weights: list[Weight] = []
    for entry in config.weights():
        if entry.layer is None:
            weights.append(Weight(entry.name, entry.shape, *ends[entry.role]))
            continue
        layer = part(
            backbone.transformer_layers[entry.layer], parts, entry.role
        )
        if entry.expert is not None:
            weights.append(_find_expert(entry, layer, banks))
            continue
        kind = entry.name.rsplit(".", 1)[1]
        attribute = "scale" if entry.role.endswith("_norm") else "kernel"
        if kind == "bias":
            attribute = "bias"
        weights.append(Weight(entry.name, entry.shape, layer, attribute))
    return weights


def _find_expert(
    entry: Entry, variable: keras.Variable, banks: dict[str, Bank]
) -> Weight:
    num_experts, _, num_outputs = variable.shape
    width = entry.shape[0]
    per_expert = num_outputs // width
    if variable.path not in banks:
        banks[variable.path] = Bank(variable, num_experts * per_expert)
    start = width if entry.role == "expert_up" and per_expert > 1 else 0
    index = (entry.expert, slice(None), slice(start, start + width))
    return Weight(entry.name, entry.shape, banks[variable.path], index)


def _read_by_calling(
    layer: keras.layers.Layer, shape: tuple[int, ...]
) -> np.ndarray:
    """A quantized layer's matrix, LoRA included: its outputs for unit inputs.

    Unit vectors survive the quantization of the inputs unchanged.
    """
    num_outputs, num_inputs = shape
    rows: np.ndarray = np.eye(num_inputs, dtype="float32")
    kernel_inputs = getattr(layer, "equation", "btd,").split(",")[0]
    if len(kernel_inputs) == 4:  # (batch, time, heads, head_dim)
        heads, head_dim = layer.kernel.shape[:2]
        rows = rows.reshape(num_inputs, heads, head_dim)
    outputs = _to_numpy(layer(ops.convert_to_tensor(rows[None])))
    if layer.bias is not None:
        outputs = outputs - _to_numpy(layer.bias)
    return outputs.reshape(num_inputs, num_outputs).T


def _to_numpy(tensor: keras.Variable) -> np.ndarray:
    return np.asarray(backend.read(ops.cast(tensor, "float32")), np.float32)
