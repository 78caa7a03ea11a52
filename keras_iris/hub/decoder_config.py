"""What a decoder's config.json says, in one form for every architecture."""

import dataclasses
from collections.abc import Mapping
from typing import Any

# The defaults are those of transformers' configuration classes, which
# published files leave out.
_SHARED = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "head_dim": None,
    "sliding_window": None,
    "num_key_value_heads": None,
    "tie_word_embeddings": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
}
# What the forward pass of KerasHub's model takes for granted.
_EXPECTED: dict[str, dict[str, Any]] = {
    "gemma": {
        "hidden_act": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": False,
    },
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "mistral": {"hidden_act": "silu", "tie_word_embeddings": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
}
_CLASSES = {
    "gemma": "GemmaForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)

MODEL_TYPES = tuple(_DEFAULTS)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers that fix a decoder's weights and forward pass."""

    model_type: str
    vocabulary_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    epsilon: float
    rope_theta: float
    rope_scaling: tuple[float, ...] | None
    sliding_window: int | None
    tie_word_embeddings: bool

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the content of a Hugging Face config.json.

        Args:
            config: The content, with a `model_type` out of `MODEL_TYPES`.

        Raises:
            ValueError: If an entry is missing, or asks for something that
                KerasHub's model of this architecture doesn't compute.
        """
        model_type = config["model_type"]
        rope = _read_rope(config)
        merged = {**_SHARED, **_DEFAULTS[model_type], **config, **rope}
        if model_type == "gemma" and merged.get("hidden_act") == "gelu":
            merged["hidden_act"] = "gelu_pytorch_tanh"  # what they mean
        _check(model_type, config, merged)
        heads = _integer(merged, "num_attention_heads")
        hidden_size = _integer(merged, "hidden_size")
        read = cls(
            model_type=model_type,
            vocabulary_size=_integer(merged, "vocab_size"),
            num_layers=_integer(merged, "num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=_integer(merged, "intermediate_size"),
            num_heads=heads,
            num_key_value_heads=_integer(merged, "num_key_value_heads", heads),
            head_dim=_integer(merged, "head_dim", hidden_size // heads),
            epsilon=_number(merged, "rms_norm_eps"),
            rope_theta=_number(merged, "rope_theta"),
            rope_scaling=rope["scaling"],
            sliding_window=_window(model_type, merged),
            tie_word_embeddings=bool(merged["tie_word_embeddings"]),
        )
        read._check_head_dim()
        return read

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads back."""
        config = {
            "architectures": [_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocabulary_size,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.rope_theta,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tie_word_embeddings,
            **_EXPECTED[self.model_type],
        }
        if self.rope_scaling is not None:
            scaling = dict(zip(_LLAMA3_SCALING, self.rope_scaling, strict=True))
            config["rope_scaling"] = {"rope_type": "llama3", **scaling}
        return config

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by their names in a checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if self.model_type == "qwen2":
            layer["self_attn.q_proj.bias"] = (queries,)
            layer["self_attn.k_proj.bias"] = (keys,)
            layer["self_attn.v_proj.bias"] = (keys,)
        embedding = (self.vocabulary_size, hidden)
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": embedding
        }
        for index in range(self.num_layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{index}.{name}"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = embedding
        return shapes

    def _check_head_dim(self) -> None:
        # KerasHub 0.32's Qwen and Llama have no `head_dim` argument.
        usual = self.hidden_size // self.num_heads
        if self.model_type in ("llama", "qwen2") and self.head_dim != usual:
            raise ValueError(
                f"config.json has head_dim={self.head_dim} where KerasHub's "
                f"{self.model_type} model takes hidden_size / "
                f"num_attention_heads = {usual}. The logits would be wrong; "
                "use another checkpoint."
            )


def _number(
    content: Mapping[str, Any], name: str, default: int | None = None
) -> float:
    """A number above 0; `default` where the entry is null."""
    value = content.get(name)
    if value is None:
        value = default
    if value is None:
        raise ValueError(
            f"config.json has no entry {name!r}, which this model needs. "
            "Download the file again."
        )
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(
            f"config.json has {name}={value!r}, expected a number above 0. "
            "Download the file again."
        )
    return float(value)


def _integer(
    content: Mapping[str, Any], name: str, default: int | None = None
) -> int:
    return int(_number(content, name, default))


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's base and scaling, in old and new files.

    transformers 5 writes both into `rope_parameters`.
    """
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        entry = config.get(name) or {}
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"config.json has {name}={entry!r}, expected an object. "
                "Download the file again."
            )
        rope |= entry
    result: dict[str, Any] = {"scaling": None}
    if "rope_theta" in rope:
        result["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3" and config["model_type"] == "llama":
        result["scaling"] = tuple(_number(rope, k) for k in _LLAMA3_SCALING)
    elif kind != "default":
        raise ValueError(
            f"config.json scales the rotary embedding by {kind!r}. Expected "
            "none, or 'llama3' for a model of type 'llama': KerasHub's model "
            "would give wrong logits. Use another checkpoint, or remove the "
            "scaling if prompts stay within the original length."
        )
    return result


def _check(
    model_type: str, config: Mapping[str, Any], merged: Mapping[str, Any]
) -> None:
    if config.get("quantization_config"):
        raise ValueError(
            "The checkpoint's weights are quantized. Expected float weights: "
            "load the original checkpoint, with `quantize='int8'` or 'int4' "
            "to quantize it here."
        )
    if "sliding_attention" in (config.get("layer_types") or ()):
        merged = {**merged, "use_sliding_window": True}
    for name, expected in _EXPECTED[model_type].items():
        value = merged.get(name)
        if value is not None and value != expected:
            raise ValueError(
                f"config.json has {name}={value!r}, expected {expected!r}: "
                f"KerasHub 0.32's {model_type} model doesn't compute "
                "anything else, and its logits would be wrong. Use another "
                "checkpoint."
            )


def _window(model_type: str, merged: Mapping[str, Any]) -> int | None:
    if model_type != "mistral" or not merged["sliding_window"]:
        return None
    return _integer(merged, "sliding_window")
