"""Re-saved and edited folders: what transformers gives, or one clear error."""

import json
import re

import numpy as np
import pytest
from reference import (
    expected_logits,
    expected_tokenizer,
    logits_of,
    random_ids,
)
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import copy, edit
from tokenizer_texts import TEXTS

import keras_iris
from keras_iris.hub import load

TOLERANCE = 1e-5  # float32 sums in another order; logits are of size 3
SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = {"rope_type": "linear", "factor": 4.0}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LEFTOVERS = {
    "two places for the rotary embedding": (
        "qwen2",
        dict(rope_parameters={"rope_theta": 5e5}, rope_scaling=LINEAR),
    ),
    "a pattern that isn't Gemma 2's": (
        "gemma2",
        dict(layer_types=None, sliding_window_pattern=3),
    ),
    "a pattern by another name": (
        "gemma3_text",
        dict(layer_types=None, _sliding_window_pattern=2),
    ),
    "a pattern": (
        "gemma3_text",
        dict(layer_types=None, sliding_window_pattern=2),
    ),
    "rotation of whole heads": ("llama", dict(partial_rotary_factor=1.0)),
    "layers without positions by their interval": (
        "smollm3",
        dict(no_rope_layers=None, layer_types=None, no_rope_layer_interval=2),
    ),
    "windows alike": ("mistral", dict(layer_types=[SLIDING, SLIDING])),
    "windows that Mixtral has in any case": (
        "mixtral",
        dict(layer_types=[FULL, FULL], sliding_window=8),
    ),
    "an activation that isn't read": ("gemma2", dict(hidden_act="gelu")),
    "no windows": ("mistral", dict(layer_types=[FULL, FULL])),
}


def check_logits(folder):
    token_ids = random_ids()
    np.testing.assert_allclose(
        logits_of(load(folder, dtype="float32"), token_ids),
        expected_logits(folder, token_ids),
        rtol=0,
        atol=TOLERANCE,
    )


@pytest.mark.parametrize("case", LEFTOVERS)
def test_config(checkpoint, tmp_path, case):
    architecture, changes = LEFTOVERS[case]
    folder = copy(checkpoint(architecture), tmp_path)
    edit(folder / "config.json", **changes)
    check_logits(folder)


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_of_tied_weights_the_head_alone(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    change_weights(folder, lambda w: w.update({HEAD: w.pop(EMBEDDING)}))
    check_logits(folder)


def test_tied_weights_that_differ(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    change_weights(folder, lambda w: w.update({HEAD: w[EMBEDDING].copy()}))
    check_logits(folder)
    change_weights(folder, lambda w: w.update({HEAD: w[EMBEDDING] * 2}))
    with pytest.raises(ValueError, match="another matrix than .*ties the two"):
        keras_iris.hub.inspect(folder)
    with pytest.raises(ValueError, match="another matrix than .*ties the two"):
        load(folder)


@pytest.mark.parametrize(
    "names",
    [
        dict(additional_special_tokens=["ing", "re"]),
        dict(extra_special_tokens=["ing"], sep_token="re"),
        dict(cls_token="ing", mask_token="re"),
        dict(image_token="ing", extra_special_tokens={"a_token": "re"}),
        dict(
            extra_special_tokens={"a_token": "ing"},
            additional_special_tokens=["re"],
        ),
    ],
)
def test_special_tokens_of_the_vocabulary(checkpoint, tmp_path, names):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "tokenizer_config.json", **names)
    check_ids(folder, "ing")
    assert {"ing", "re"} <= set(load(folder).tokenizer.special_tokens)


def test_tokens_of_an_old_folder(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    number = content["added_tokens"][-1]["id"] + 1
    edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    (folder / "added_tokens.json").write_text(json.dumps({"the": number}))
    check_ids(folder, "the")


def check_ids(folder, token):
    tokenizer, expected = load(folder).tokenizer, expected_tokenizer(folder)
    ids = [expected(t, add_special_tokens=False).input_ids for t in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == ids
    assert any(token in text for text in TEXTS)
    assert len(tokenizer.encode(token)) == 1


def test_an_adapter_beside_the_model(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    message = re.escape(f"load_adapter(causal_lm, {str(folder)!r})")
    with pytest.warns(UserWarning, match=message):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no model.*'org/base'.*" + message):
        load(folder)


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 8}, {"lora_targets": "all"}]
)
def test_options_of_adapters_without_their_rank(checkpoint, options):
    with pytest.raises(ValueError, match="Without `lora_rank`"):
        load(checkpoint("qwen2"), **options)
    load(checkpoint("qwen2"), lora_targets=["query", "value"])


def test_an_old_map_beside_newer_files(checkpoint, tmp_path):
    """transformers doesn't read it, nor what else there was before."""
    folder = copy(checkpoint("qwen2"), tmp_path)
    added = {"630": {"content": "<|endoftext|>", "special": True}}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" not in config:
        content = json.loads((folder / "tokenizer.json").read_text())
        added = {str(t.pop("id")): t for t in content["added_tokens"]}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    (folder / "special_tokens_map.json").write_text('{"mask_token": "ing"}')
    (folder / "added_tokens.json").write_text("{")
    tokenizer = load(folder).tokenizer
    assert "ing" not in tokenizer.special_tokens
    assert len(tokenizer.encode("ing")) == 1  # by merging
    (folder / "added_tokens.json").unlink()
    check_ids(folder, "ing")
