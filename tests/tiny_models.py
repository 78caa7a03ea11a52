"""Tiny random causal LMs and batches of pairs for the tests."""

import keras
import keras_hub
import numpy as np

VOCABULARY_SIZE = 37

_SIZES = dict(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=32,
    intermediate_dim=64,
)
_EXPERTS = dict(
    num_experts=4,
    top_k=2,
    moe_intermediate_dim=16,
    shared_expert_intermediate_dim=16,
)


def make_causal_lm(architecture="qwen", seed=0, **options):
    keras.utils.set_random_seed(seed)
    options = {**_SIZES, **options}
    models = keras_hub.models
    match architecture:
        case "qwen":
            options.setdefault("tie_word_embeddings", True)
            backbone = models.QwenBackbone(**options)
            return models.QwenCausalLM(backbone=backbone, preprocessor=None)
        case "mistral":
            backbone = models.MistralBackbone(**options)
            return models.MistralCausalLM(backbone=backbone, preprocessor=None)
        case "llama":
            backbone = models.Llama3Backbone(**options)
            return models.Llama3CausalLM(backbone=backbone, preprocessor=None)
        case "gemma":
            options.setdefault("final_logit_soft_cap", 5.0)
            backbone = models.GemmaBackbone(head_dim=8, **options)
            return models.GemmaCausalLM(backbone=backbone, preprocessor=None)
        case "qwen_moe":
            options = {**_EXPERTS, "tie_word_embeddings": True, **options}
            backbone = models.QwenMoeBackbone(**options)
            return models.QwenMoeCausalLM(backbone=backbone, preprocessor=None)
    raise ValueError(architecture)


def make_pairs(batch_size=8, length=16, seed=0):
    """Random pairs, responses of different lengths."""
    rng = np.random.default_rng(seed)
    shape = (batch_size, 2, length)
    starts = rng.integers(2, 6, (batch_size, 1, 1))
    ends = rng.integers(7, length + 1, (batch_size, 2, 1))
    positions = np.arange(length)
    return {
        "token_ids": rng.integers(1, VOCABULARY_SIZE, shape).astype("int32"),
        "padding_mask": positions < ends,
        "response_mask": (positions >= starts) & (positions < ends),
    }
