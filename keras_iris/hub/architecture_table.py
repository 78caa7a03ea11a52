"""The table of architectures: a row for each that is exact.

To add one, add its row here and its tiny checkpoint to
`tests/tiny_checkpoints.py`; the tests go over the table.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_iris.models import decoder_parts

# Entries of config.json and the arguments of KerasHub's backbones.
_ARGUMENTS = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "layer_norm_epsilon",
}
_HEAD_DIM = {"head_dim": "head_dim"}
_TIED = {"tie_word_embeddings": "tie_word_embeddings"}
_WINDOW = {"sliding_window": "sliding_window"}
_SOFT_CAP = {"final_logit_softcapping": "final_logit_soft_cap"}
_EXPERTS = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "moe_intermediate_dim",
    "norm_topk_prob": "norm_top_k_prob",
    "decoder_sparse_step": "decoder_sparse_step",
    "mlp_only_layers": "mlp_only_layers",
    "router_aux_loss_coef": "router_aux_loss_coefficient",
}
_ROUTER_DEFAULTS = {
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_EXPERTS_DEFAULTS = _ROUTER_DEFAULTS | {
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
_DEFAULTS = {
    "num_key_value_heads": None,  # as many as queries
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_NAMES = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "feedforward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "expert_gate": "mlp.experts.{}.gate_proj",
    "expert_up": "mlp.experts.{}.up_proj",
    "expert_down": "mlp.experts.{}.down_proj",
    "shared_gate": "mlp.shared_expert.gate_proj",
    "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_router": "mlp.shared_expert_gate",
}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "feedforward_norm": "pre_feedforward_layernorm",
    "post_feedforward_norm": "post_feedforward_layernorm",
}
_MIXTRAL_NAMES = {
    "router": "block_sparse_moe.gate",
    "expert_gate": "block_sparse_moe.experts.{}.w1",
    "expert_up": "block_sparse_moe.experts.{}.w3",
    "expert_down": "block_sparse_moe.experts.{}.w2",
}
_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_QWEN = {"hidden_act": "silu", "use_sliding_window": False}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
    "tie_word_embeddings": True,
}
_GEMMA_DEFAULTS = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A row: what a decoder is called, on either side.

    Attributes:
        class_name: The class in transformers.
        keras_hub: The stem of KerasHub's `...Backbone` and `...CausalLM`.
        parts: A table of `keras_iris.models.decoder_parts`.
        arguments: Entries of config.json and KerasHub's arguments for them.
        adjusted: Entries that are set on KerasHub's layers, which have no
            argument for them.
        defaults: What transformers takes for entries that are left out.
        expected: What KerasHub's model takes for granted.
        aliases: Other names of entries.
        fixed: Arguments of KerasHub that make it this architecture.
        names: The weights of a layer, by role.
        biases: The roles that have a bias.
        windows: Where a layer's window is set: `None` for models without,
            `"argument"` for one of all layers, `"layer"` for one of each.
        window_pattern: Without `layer_types`, each layer of this number has
            no window; an entry of `defaults` where files may say another.
        reads_layer_types: Whether transformers reads `layer_types`.
        ropes: The kinds of rotary embeddings that KerasHub's layers know.
        theta: KerasHub's argument for the base of the rotary embedding, or
            `None`.
        final_norm: The backbone's last norm.
        halves: KerasHub counts gate and up projection together: 2, or 1.
    """

    class_name: str
    keras_hub: str
    parts: Mapping[str, str]
    arguments: Mapping[str, str]
    adjusted: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    expected: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    windows: str | None = None
    window_pattern: int = 2
    reads_layer_types: bool = True
    ropes: tuple[str, ...] = ("default", "linear")
    theta: str | None = "rope_max_wavelength"
    final_norm: str = "layer_norm"
    halves: int = 1

    @property
    def is_sparse(self) -> bool:
        """Whether layers have experts and a router."""
        return "router" in self.parts

    def __post_init__(self) -> None:
        for name, shared in (
            ("arguments", _ARGUMENTS),
            ("defaults", _DEFAULTS),
            ("names", _NAMES),
        ):
            object.__setattr__(self, name, {**shared, **getattr(self, name)})


_GEMMA2 = Architecture(
    "Gemma2ForCausalLM",
    "Gemma",
    decoder_parts.GEMMA2,
    arguments=_HEAD_DIM
    | _SOFT_CAP
    | {"attn_logit_softcapping": "attention_logit_soft_cap"},
    adjusted=("query_pre_attn_scalar",),
    defaults=_GEMMA2_DEFAULTS
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    expected=_GEMMA,
    fixed={"use_post_ffw_norm": True, "use_post_attention_norm": True},
    names=_GEMMA_NORMS,
    windows="layer",
    theta=None,
    halves=2,
)
_QWEN2_MOE = Architecture(
    "Qwen2MoeForCausalLM",
    "QwenMoe",
    decoder_parts.QWEN_MOE,
    arguments=_TIED
    | _EXPERTS
    | {"shared_expert_intermediate_size": "shared_expert_intermediate_dim"},
    adjusted=("output_router_logits",),
    defaults=_EXPERTS_DEFAULTS
    | {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    # KerasHub's layers all take themselves for the first.
    expected=_QWEN
    | {"qkv_bias": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    aliases={"num_local_experts": "num_experts"},
    fixed={"use_sliding_window_attention": False},
    biases=("query", "key", "value"),
)
ARCHITECTURES = {
    "gemma": Architecture(
        "GemmaForCausalLM",
        "Gemma",
        decoder_parts.GEMMA,
        arguments=_HEAD_DIM,
        defaults=_GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        expected=_GEMMA,
        fixed={"use_post_ffw_norm": False, "use_post_attention_norm": False},
        theta=None,
        halves=2,
    ),
    "gemma2": _GEMMA2,
    "gemma3_text": dataclasses.replace(
        _GEMMA2,
        class_name="Gemma3ForCausalLM",
        keras_hub="Gemma3",
        parts=decoder_parts.GEMMA3,
        arguments=_HEAD_DIM | _SOFT_CAP,
        defaults=_GEMMA2_DEFAULTS
        | {
            "final_logit_softcapping": None,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        },
        fixed={
            **_GEMMA2.fixed,
            "use_query_key_norm": True,
            "vision_encoder": None,
            "image_size": None,
        },
        halves=1,
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "Llama3",
        decoder_parts.LLAMA,
        arguments=_TIED,
        expected=_LLAMA,
        ropes=("default", "llama3"),
    ),
    "mistral": Architecture(
        "MistralForCausalLM",
        "Mistral",
        decoder_parts.LLAMA,
        arguments=_HEAD_DIM | _WINDOW,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        expected={"hidden_act": "silu", "tie_word_embeddings": False},
        windows="argument",
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "Mixtral",
        decoder_parts.MIXTRAL,
        arguments=_WINDOW
        | {
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        adjusted=("output_router_logits",),
        defaults=_ROUTER_DEFAULTS
        | {
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
        },
        expected={"hidden_act": "silu", "tie_word_embeddings": False},
        aliases={"num_experts": "num_local_experts"},
        names=_MIXTRAL_NAMES,
        windows="argument",
        reads_layer_types=False,
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "Qwen",
        decoder_parts.LLAMA,
        arguments=_TIED,
        defaults={"num_key_value_heads": 32},
        expected=_QWEN,
        fixed=_QWEN2_MOE.fixed,
        biases=_QWEN2_MOE.biases,
    ),
    "qwen2_moe": _QWEN2_MOE,
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "Qwen3",
        decoder_parts.QWEN3,
        arguments=_HEAD_DIM | _TIED,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        expected=_QWEN | {"attention_bias": False},
        fixed={"sliding_window_size": None},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3Moe",
        decoder_parts.QWEN3_MOE,
        arguments=_HEAD_DIM | _TIED | _EXPERTS,
        adjusted=("output_router_logits",),
        defaults=_EXPERTS_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        expected=_QWEN | {"attention_bias": False},
        aliases=_QWEN2_MOE.aliases,
        fixed={"sliding_window_size": None},
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        "SmolLM3",
        decoder_parts.SMOLLM3,
        arguments={
            "num_attention_heads": "num_attention_heads",
            "no_rope_layers": "rope_layer_enabled_list",
            "layer_types": "layer_types",
        },
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
        },
        expected=_QWEN | _LLAMA | {"tie_word_embeddings": True},
        fixed={
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": 32768,  # which it only keeps
            "mlp_bias": False,
            "partial_rotary_factor": 1.0,
        },
        ropes=("default",),
        theta="rope_theta",
        final_norm="norm",
    ),
}
