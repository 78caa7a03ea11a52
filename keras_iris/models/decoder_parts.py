"""What the parts of KerasHub's decoders are called.

KerasHub (0.32) offers no public access to them; this is the only module that
knows the names. `tests/models/test_decoder_parts.py` fails if a version has
others.
"""

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_iris.backend import AutocastScope

LLAMA = {
    "attention": "_self_attention_layer",
    "attention_norm": "_self_attention_layernorm",
    "query": "_self_attention_layer._query_dense",
    "key": "_self_attention_layer._key_dense",
    "value": "_self_attention_layer._value_dense",
    "output": "_self_attention_layer._output_dense",
    "rope": "_self_attention_layer.rotary_embedding_layer",
    "feedforward_norm": "_feedforward_layernorm",
    "gate": "_feedforward_gate_dense",
    "up": "_feedforward_intermediate_dense",
    "down": "_feedforward_output_dense",
    # Methods and functions.
    "angles": (
        "_self_attention_layer.rotary_embedding_layer"
        "._compute_cos_sin_embedding"
    ),
    "rotate": (
        "_self_attention_layer.rotary_embedding_layer._apply_rotary_pos_emb"
    ),
    "attend": "_self_attention_layer._compute_attention",
    "activation": "activation",
}
QWEN3 = LLAMA | {
    "query_norm": "_self_attention_layer._query_dense_layer_norm",
    "key_norm": "_self_attention_layer._key_dense_layer_norm",
}
GEMMA = {
    "attention": "attention",
    "attention_norm": "pre_attention_norm",
    "query": "attention.query_dense",
    "key": "attention.key_dense",
    "value": "attention.value_dense",
    "output": "attention.output_dense",
    "rope": "attention.rope_layer",
    "feedforward_norm": "pre_ffw_norm",
    "gate": "gating_ffw",
    "up": "gating_ffw_2",
    "down": "ffw_linear",
}
GEMMA2 = GEMMA | {
    "post_attention_norm": "post_attention_norm",
    "post_feedforward_norm": "post_ffw_norm",
}
GEMMA3 = GEMMA2 | {
    "query_norm": "attention.query_norm",
    "key_norm": "attention.key_norm",
}
MIXTRAL = {
    "attention": "_self_attention_layer",
    "attention_norm": "_self_attention_layernorm",
    "query": "_self_attention_layer.query_dense",
    "key": "_self_attention_layer.key_dense",
    "value": "_self_attention_layer.value_dense",
    "output": "_self_attention_layer.output_dense",
    "rope": "_self_attention_layer.rotary_embedding_layer",
    "feedforward_norm": "_feedforward_layernorm",
    "router": "_sparse_moe_block._sparse_feedforward_gate_dense",
    "expert_gate": (
        "_sparse_moe_block.expert_bank._expert_feedforward_gate_dense"
    ),
    "expert_up": (
        "_sparse_moe_block.expert_bank._expert_feedforward_intermediate_dense"
    ),
    "expert_down": (
        "_sparse_moe_block.expert_bank._expert_feedforward_output_dense"
    ),
}
# Dense and sparse layers; an expert's gate and up are one matrix, in halves.
_QWEN_EXPERTS = {
    "gate": "mlp._feedforward_gate_dense",
    "up": "mlp._feedforward_intermediate_dense",
    "down": "mlp._feedforward_output_dense",
    "router": "mlp._sparse_feedforward_gate_dense",
    "expert_gate": "mlp.expert_bank._expert_feedforward_gate_dense",
    "expert_up": "mlp.expert_bank._expert_feedforward_gate_dense",
    "expert_down": "mlp.expert_bank._expert_feedforward_output_dense",
}
QWEN3_MOE = QWEN3 | _QWEN_EXPERTS
QWEN_MOE = (
    LLAMA
    | _QWEN_EXPERTS
    | {
        "query": "_self_attention_layer.query_dense",
        "key": "_self_attention_layer.key_dense",
        "value": "_self_attention_layer.value_dense",
        "shared_gate": "mlp.shared_expert_dense._feedforward_gate_dense",
        "shared_up": "mlp.shared_expert_dense._feedforward_intermediate_dense",
        "shared_down": "mlp.shared_expert_dense._feedforward_output_dense",
        "shared_router": "mlp.shared_expert_gate_dense",
    }
)
# Its rotary embedding can't be changed once it is made.
SMOLLM3 = {
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "feedforward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def part(layer: Any, parts: Mapping[str, str], role: str) -> Any:
    """A part of a decoder layer.

    Args:
        layer: One of `backbone.transformer_layers`.
        parts: The table above that names its parts.
        role: A key of that table.
    """
    return operator.attrgetter(parts[role])(layer)


def build_cache(causal_lm: Any, token_ids: Any) -> Any:
    """The cache of a causal LM after tokens, in the model's own layout.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
        token_ids: Integer tensor of shape `(batch, time)`.
    """
    build = causal_lm._build_cache
    # What it takes beside token ids is for images.
    others = [None] * (len(inspect.signature(build).parameters) - 1)
    _, cache = build(token_ids, *others)
    return cache


def direct(layer: Any) -> Callable[..., Any]:
    """What a layer computes, without what Keras does around each call.

    Checks, name scopes and conversions take longer than the products of a few
    tokens where nothing is compiled. The inputs have to be tensors of the
    layer's compute dtype.

    Args:
        layer: A built one; other callables are given back.
    """
    if not isinstance(layer, keras.layers.Layer):
        return layer
    call = layer.quantized_call if layer.quantization_mode else layer.call
    if layer.compute_dtype == layer.variable_dtype:
        return call

    def call_in_compute_dtype(*args: Any, **kwargs: Any) -> Any:
        with AutocastScope(layer.compute_dtype):
            return call(*args, **kwargs)

    return call_in_compute_dtype
