"""KerasHub models of the architectures whose parity is tested."""

from typing import Any

import keras

from keras_iris.hub.decoder_config import DecoderConfig


def make_causal_lm(config: DecoderConfig, *, dtype: Any = None) -> keras.Model:
    """A KerasHub causal LM with random weights and no preprocessor.

    KerasHub's own converters aren't used: those of 0.32 drop Llama's
    `rms_norm_eps`, the rotary scaling that transformers 5 writes, and
    Qwen2's sliding window, and round Mistral's weights to float16.

    Args:
        config: The architecture and its sizes.
        dtype: A Keras dtype policy, or its name.
    """
    # Imported here because it takes seconds.
    from keras_hub import models

    sizes: dict[str, Any] = dict(
        vocabulary_size=config.vocabulary_size,
        num_layers=config.num_layers,
        num_query_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_dim=config.hidden_size,
        intermediate_dim=config.intermediate_size,
        layer_norm_epsilon=config.epsilon,
        dtype=dtype,
    )
    rope = {"rope_max_wavelength": config.rope_theta}
    match config.model_type:
        case "gemma":
            # KerasHub counts gate and up projection together.
            sizes["intermediate_dim"] *= 2
            backbone = models.GemmaBackbone(head_dim=config.head_dim, **sizes)
            causal_lm = models.GemmaCausalLM
        case "llama":
            backbone = models.Llama3Backbone(
                tie_word_embeddings=config.tie_word_embeddings,
                **_llama3_scaling(config),
                **rope,
                **sizes,
            )
            causal_lm = models.Llama3CausalLM
        case "mistral":
            backbone = models.MistralBackbone(
                head_dim=config.head_dim,
                sliding_window=config.sliding_window,
                **rope,
                **sizes,
            )
            causal_lm = models.MistralCausalLM
        case "qwen2":
            backbone = models.QwenBackbone(
                tie_word_embeddings=config.tie_word_embeddings, **rope, **sizes
            )
            causal_lm = models.QwenCausalLM
    return causal_lm(backbone=backbone, preprocessor=None)


def read_config(backbone: keras.Model) -> DecoderConfig:
    """What `make_causal_lm` would need to make this backbone.

    Args:
        backbone: A KerasHub backbone.

    Raises:
        ValueError: If its architecture isn't one of the four, or it uses
            something that a Hugging Face config.json cannot say.
    """
    model_type = _model_type(backbone)
    is_gemma = model_type == "gemma"
    heads = backbone.num_query_heads
    head_dim = getattr(backbone, "head_dim", None)
    return DecoderConfig(
        model_type=model_type,
        vocabulary_size=backbone.vocabulary_size,
        num_layers=backbone.num_layers,
        hidden_size=backbone.hidden_dim,
        intermediate_size=backbone.intermediate_dim // (2 if is_gemma else 1),
        num_heads=heads,
        num_key_value_heads=backbone.num_key_value_heads,
        head_dim=head_dim or backbone.hidden_dim // heads,
        epsilon=backbone.layer_norm_epsilon,
        rope_theta=10000.0 if is_gemma else float(backbone.rope_max_wavelength),
        rope_scaling=_read_llama3_scaling(backbone),
        sliding_window=(
            backbone.sliding_window if model_type == "mistral" else None
        ),
        tie_word_embeddings=backbone.token_embedding.tie_weights,
    )


def _model_type(backbone: keras.Model) -> str:
    from keras_hub import models

    types = {
        models.GemmaBackbone: "gemma",
        models.Llama3Backbone: "llama",
        models.MistralBackbone: "mistral",
        models.QwenBackbone: "qwen2",
    }
    model_type = types.get(type(backbone))
    if model_type is None or not _is_plain(model_type, backbone):
        raise ValueError(
            f"Cannot write a {type(backbone).__name__} with this "
            "configuration as a Hugging Face folder. Expected Gemma 1, Llama "
            "3, Mistral or Qwen2 without position interpolation; for another "
            "architecture try KerasHub's `export_to_transformers`."
        )
    return model_type


def _is_plain(model_type: str, backbone: keras.Model) -> bool:
    match model_type:
        case "gemma":
            return not (
                backbone.use_post_ffw_norm
                or backbone.use_sliding_window_attention
                or backbone.final_logit_soft_cap
            )
        case "llama":
            return bool(backbone.rope_position_scaling_factor == 1.0)
        case "qwen2" if backbone.use_sliding_window_attention:
            return False
    return bool(backbone.rope_scaling_factor == 1.0)


def _llama3_scaling(config: DecoderConfig) -> dict[str, float]:
    if config.rope_scaling is None:
        return {}
    factor, low, high, length = config.rope_scaling
    return dict(
        rope_frequency_adjustment_factor=factor,
        rope_low_freq_factor=low,
        rope_high_freq_factor=high,
        rope_pretraining_sequence_length=int(length),
    )


def _read_llama3_scaling(backbone: keras.Model) -> tuple[float, ...] | None:
    factor = getattr(backbone, "rope_frequency_adjustment_factor", None)
    if factor is None:
        return None
    return (
        float(factor),
        float(backbone.rope_low_freq_factor),
        float(backbone.rope_high_freq_factor),
        float(backbone.rope_pretraining_sequence_length),
    )
