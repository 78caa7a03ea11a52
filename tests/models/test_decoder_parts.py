"""The private names of KerasHub that `decoder_parts` lists."""

import keras_hub
import pytest

from keras_iris.models import decoder_parts
from keras_iris.models.decoder_parts import part

TESTED = "0.32."
_SIZES = dict(
    vocabulary_size=7,
    num_layers=1,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
    intermediate_dim=8,
)
_EXPERTS = dict(num_experts=2, top_k=1)


def _backbone(name, **options):
    sizes = dict(_SIZES)
    if "num_attention_heads" in options:
        del sizes["num_query_heads"]
    return getattr(keras_hub.models, f"{name}Backbone")(**sizes, **options)


def _names(parts, *left_out):
    return [role for role in parts if role not in left_out]


@pytest.mark.parametrize(
    "table, name, options",
    [
        ("LLAMA", "Llama3", {}),
        ("LLAMA", "Mistral", {}),
        ("LLAMA", "Qwen", {}),
        ("QWEN3", "Qwen3", dict(head_dim=4)),
        ("GEMMA", "Gemma", dict(head_dim=4)),
        (
            "GEMMA2",
            "Gemma",
            dict(
                head_dim=4, use_post_ffw_norm=True, use_post_attention_norm=True
            ),
        ),
        (
            "GEMMA3",
            "Gemma3",
            dict(
                head_dim=4,
                image_size=None,
                use_post_ffw_norm=True,
                use_post_attention_norm=True,
            ),
        ),
        ("MIXTRAL", "Mixtral", _EXPERTS),
        (
            "QWEN_MOE",
            "QwenMoe",
            dict(
                moe_intermediate_dim=4,
                shared_expert_intermediate_dim=4,
                **_EXPERTS,
            ),
        ),
        ("QWEN3_MOE", "Qwen3Moe", dict(moe_intermediate_dim=4, **_EXPERTS)),
        (
            "SMOLLM3",
            "SmolLM3",
            dict(
                num_attention_heads=2,
                attention_bias=False,
                attention_dropout=0.0,
                rope_layer_enabled_list=[True],
                layer_types=["full_attention"],
                mlp_bias=False,
                layer_norm_epsilon=1e-6,
                max_position_embeddings=8,
                rope_theta=1e4,
                partial_rotary_factor=1.0,
            ),
        ),
    ],
)
def test_names(table, name, options):
    parts = getattr(decoder_parts, table)
    (layer,) = _backbone(name, **options).transformer_layers
    # The network of dense layers, in a model whose layers are all sparse.
    left_out = ("gate", "up", "down") if "router" in parts else ()
    missing = []
    for role in _names(parts, *left_out):
        try:
            part(layer, parts, role)
        except AttributeError:
            missing.append(parts[role])
    version = keras_hub.__version__
    assert not missing, f"KerasHub {version}, expected the names of {TESTED}x"


def test_version():
    """A new one is tested on purpose: with its bounds in pyproject.toml."""
    assert keras_hub.__version__.startswith(TESTED)
