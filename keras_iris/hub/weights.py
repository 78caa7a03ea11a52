"""Where each weight of a checkpoint lives in KerasHub's model.

One table serves loading and exporting. The attribute names are those of
KerasHub 0.32, which offers no public access to a decoder layer's parts.
"""

import dataclasses
import math
import operator

import keras
import numpy as np
from keras import ops

from keras_iris.hub.decoder_config import DecoderConfig
from keras_iris.models.lora import LoraLayer

_LLAMA_LAYER = {
    "input_layernorm": "_self_attention_layernorm",
    "self_attn.q_proj": "_self_attention_layer._query_dense",
    "self_attn.k_proj": "_self_attention_layer._key_dense",
    "self_attn.v_proj": "_self_attention_layer._value_dense",
    "self_attn.o_proj": "_self_attention_layer._output_dense",
    "post_attention_layernorm": "_feedforward_layernorm",
    "mlp.gate_proj": "_feedforward_gate_dense",
    "mlp.up_proj": "_feedforward_intermediate_dense",
    "mlp.down_proj": "_feedforward_output_dense",
}
_GEMMA_LAYER = {
    "input_layernorm": "pre_attention_norm",
    "self_attn.q_proj": "attention.query_dense",
    "self_attn.k_proj": "attention.key_dense",
    "self_attn.v_proj": "attention.value_dense",
    "self_attn.o_proj": "attention.output_dense",
    "post_attention_layernorm": "pre_ffw_norm",
    "mlp.gate_proj": "gating_ffw",
    "mlp.up_proj": "gating_ffw_2",
    "mlp.down_proj": "ffw_linear",
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight: a name and shape in the checkpoint, a layer in the model.

    Attributes:
        name: The name in the checkpoint.
        shape: The shape in the checkpoint.
        layer: The Keras layer.
        attribute: `"kernel"`, `"bias"`, `"scale"`, `"embeddings"` or
            `"reverse_embeddings"`.
    """

    name: str
    shape: tuple[int, ...]
    layer: keras.layers.Layer
    attribute: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def assign(self, array: np.ndarray) -> None:
        """Sets the layer's variable from the checkpoint's array."""
        variable = getattr(self.layer, self.attribute)
        variable.assign(self._to_keras(array, tuple(variable.shape)))

    def read(self) -> np.ndarray:
        """The checkpoint's array, with LoRA merged and not quantized.

        Returns:
            A float32 array of shape `self.shape`.
        """
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
    """The weights in the order of a checkpoint.

    Args:
        backbone: A KerasHub backbone.
        config: Its configuration, as `read_config` gives it.
    """
    layer_names = _GEMMA_LAYER if config.model_type == "gemma" else _LLAMA_LAYER
    weights = []
    for name, shape in config.weight_shapes().items():
        stem, kind = name.rsplit(".", 1)
        match stem.split("."):
            case ["model", "embed_tokens"]:
                layer, attribute = backbone.token_embedding, "embeddings"
            case ["lm_head"]:
                layer, attribute = (
                    backbone.token_embedding,
                    "reverse_embeddings",
                )
            case ["model", "norm"]:
                layer, attribute = backbone.layer_norm, "scale"
            case ["model", "layers", index, *rest]:
                block = backbone.transformer_layers[int(index)]
                part = ".".join(rest)
                layer = operator.attrgetter(layer_names[part])(block)
                attribute = "scale" if part.endswith("layernorm") else "kernel"
                if kind == "bias":
                    attribute = "bias"
        weights.append(Weight(name, shape, layer, attribute))
    return weights


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
    return np.asarray(
        ops.convert_to_numpy(ops.cast(tensor, "float32")), np.float32
    )
