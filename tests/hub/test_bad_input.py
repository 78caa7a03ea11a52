"""Bad input of `load`: one clear error each, before a model is built."""

import importlib
import json
import re
import struct

import pytest
from safetensors import SafetensorError
from tiny_checkpoints import copy, edit

from keras_iris.hub import load


@pytest.fixture
def no_model(monkeypatch):
    def make_causal_lm(*args, **kwargs):
        raise AssertionError("a model was built before the error")

    module = importlib.import_module("keras_iris.hub.load")
    monkeypatch.setattr(module, "make_causal_lm", make_causal_lm)


BAD_CONFIGS = {
    "sliding window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "use_sliding_window=True, expected False",
    ),
    "layer types": (
        "qwen2",
        dict(layer_types=["full_attention", "sliding_attention"]),
        "for a qwen2 model 'full_attention' alone",
    ),
    "windows of some layers": (
        "mistral",
        dict(layer_types=["full_attention", "sliding_attention"]),
        "for a mistral model of one kind",
    ),
    "one rotary embedding for two": (
        "gemma3_text",
        dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "two rotary embeddings",
    ),
    "two rotary embeddings for one": (
        "llama",
        dict(rope_parameters={"full_attention": {"rope_theta": 5e5}}),
        "full_attention={'rope_theta': 500000.0} for the rotary embedding",
    ),
    "an interval of no layers": (
        "smollm3",
        dict(no_rope_layers=None, no_rope_layer_interval=0),
        "no_rope_layer_interval=0, expected",
    ),
    "the exact activation": (
        "gemma2",
        dict(hidden_activation="gelu"),
        "hidden_activation='gelu', expected 'gelu_pytorch_tanh'",
    ),
    "activation": ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "biases": ("llama", dict(attention_bias=True), "attention_bias=True"),
    "head size": ("qwen2", dict(head_dim=8), "head_dim=8, expected 16"),
    "unknown": ("qwen2", dict(logit_scale=2.0), "logit_scale=2.0, an entry"),
    "unknown scaling": (
        "qwen2",
        dict(rope_parameters={"rope_theta": 1e4, "mrope_section": [2, 2]}),
        "mrope_section=[2, 2] for the rotary embedding",
    ),
    "layers without positions": (
        "smollm3",
        dict(no_rope_layers=[1]),
        "no_rope_layers=[1], expected a list of 2",
    ),
    "windows": (
        "gemma2",
        dict(layer_types=["chunked_attention", "full_attention"]),
        "layer_types=['chunked_attention', 'full_attention']",
    ),
    "tied": ("mistral", dict(tie_word_embeddings=True), "tie_word_embeddings"),
    "rotary scaling": (
        "llama",
        dict(
            rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={}
        ),
        "rotary embedding by 'linear'",
    ),
    "quantized": (
        "llama",
        dict(quantization_config={"quant_method": "gptq"}),
        "weights are quantized",
    ),
    "llama3 scaling": (
        "llama",
        dict(rope_scaling={"rope_type": "llama3"}, rope_parameters={}),
        "config.json has no entry 'factor'",
    ),
    "scaling in one word": (
        "llama",
        dict(rope_scaling="linear"),
        "config.json has rope_scaling='linear', expected an object",
    ),
    "vocabulary": (
        "llama",
        dict(vocab_size="many"),
        "config.json has vocab_size='many', expected a number above 0",
    ),
    "heads": (
        "llama",
        dict(num_attention_heads=0),
        "config.json has num_attention_heads=0, expected a number above 0",
    ),
    "half a layer": (
        "llama",
        dict(num_hidden_layers=1.5),
        "num_hidden_layers=1.5, expected a whole number up to 1000",
    ),
    "layers that would fill the memory": (
        "llama",
        dict(num_hidden_layers=10**8),
        "expected a whole number up to 1000",
    ),
    "an infinite size": (
        "llama",
        dict(hidden_size=float("inf")),
        "hidden_size=inf, expected a number above 0",
    ),
    "a number too long for a float": (
        "llama",
        dict(vocab_size=10**400),
        "..., expected a number above 0",
    ),
    "a number of windows": (
        "gemma2",
        dict(layer_types=2),
        "layer_types=2, expected 2 out of",
    ),
    "layers by name": (
        "qwen3_moe",
        dict(mlp_only_layers=["first"]),
        "mlp_only_layers=['first'], expected a list of layers' numbers",
    ),
    "incomplete": ("llama", dict(hidden_size=None), "no entry 'hidden_size'"),
    "other shapes": ("llama", dict(intermediate_size=128), "with shape"),
    "too many layers": ("llama", dict(num_hidden_layers=3), "lacks 9 of 29"),
    "small vocabulary": (
        "qwen2",
        dict(vocab_size=600),
        "ids up to 634, the model 600 embeddings",
    ),
    "large vocabulary": ("qwen2", dict(vocab_size=700), "with shape"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(checkpoint, tmp_path, no_model, case):
    architecture, changes, message = BAD_CONFIGS[case]
    folder = copy(checkpoint(architecture), tmp_path)
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _truncate(name, size):
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:size])

    return change


def _write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _index(content):
    """Replaces the single file by an index."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_bytes(content)

    return change


def _integers(folder):
    entry = {"dtype": "I8", "shape": [640, 64], "data_offsets": [0, 40960]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(40960)
    (folder / "model.safetensors").write_bytes(content)


def _other_offsets(folder):
    entry = {"dtype": "F32", "shape": [640, 64], "data_offsets": [0, 4]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(content)


def _another_tokenizer(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for number in range(10):
        token = {**content["added_tokens"][-1], "content": f"<{number}>"}
        token["id"] = content["added_tokens"][-1]["id"] + 1
        content["added_tokens"].append(token)
    file.write_text(json.dumps(content))


BAD_FILES = {
    "no weights": (_remove("model.safetensors"), "lacks its weights"),
    "a shard is missing": (
        _index(b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
        "lacks its weights: model-00002-of-00002.safetensors",
    ),
    "an index that leads out of the folder": (
        _index(b'{"weight_map": {"a": "../model.safetensors"}}'),
        "model.safetensors.index.json has no valid 'weight_map': received "
        "'../model.safetensors'",
    ),
    "an index with a name that no disk takes": (
        _index(b'{"weight_map": {"a": "%s.safetensors"}}' % (b"a" * 300)),
        "has no valid 'weight_map'",
    ),
    "an index with half a character": (
        _index(b'{"weight_map": {"a": "\\ud800.safetensors"}}'),
        "has no valid 'weight_map'",
    ),
    "deep nesting": (
        _write("config.json", b'{"a":' * 100_000),
        "config.json is not valid JSON (it is nested too deeply)",
    ),
    "thousands of digits": (
        _write("generation_config.json", b'{"a": %s}' % (b"9" * 5000)),
        "generation_config.json is not valid JSON",
    ),
    "end tokens of other types": (
        _write("generation_config.json", b'{"eos_token_id": [1, "2"]}'),
        "generation_config.json has eos_token_id=[1, '2'], expected",
    ),
    "templates without names": (
        _write("tokenizer_config.json", b'{"chat_template": ["{{ 1 }}"]}'),
        "'chat_template' in",
    ),
    "added tokens of other types": (
        _write("tokenizer_config.json", b'{"added_tokens_decoder": {"a": {}}}'),
        "have tokens that can't be read",
    ),
    "a model of another type": (
        _write("tokenizer.json", b'{"model": 0.5}'),
        "have tokens that can't be read",
    ),
    "an index without a map": (
        _index(b'{"weight_map": ["a"]}'),
        "model.safetensors.index.json has no valid 'weight_map': received "
        "None in ['a']",
    ),
    "truncated weights": (
        _truncate("model.safetensors", -10),
        "model.safetensors is truncated or damaged",
    ),
    "truncated header": (
        _truncate("model.safetensors", 100),
        "is truncated or damaged",
    ),
    "empty weights": (
        _truncate("model.safetensors", 0),
        "is truncated or damaged",
    ),
    "header of other weights": (_other_offsets, "is truncated or damaged"),
    "other weights": (_integers, "as I8"),
    "no config": (_remove("config.json"), "has no config.json"),
    "broken config": (_truncate("config.json", 50), "not valid JSON"),
    "a list": (_write("config.json", b"[1]"), "holds a list"),
    "no tokenizer": (_remove("tokenizer.json"), "has no tokenizer.json"),
    "broken tokenizer": (_truncate("tokenizer.json", 90), "not valid JSON"),
    "strange tokenizer": (
        _write("tokenizer.json", b'{"model": {"type": "Magic"}}'),
        "cannot be read",
    ),
    "tokenizer of another model": (
        _another_tokenizer,
        "ids up to 644, the model 640 embeddings",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(checkpoint, tmp_path, no_model, case):
    folder = copy(checkpoint("qwen2"), tmp_path)
    change, message = BAD_FILES[case]
    change(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(folder)


def test_a_type_of_model_that_is_none(checkpoint, tmp_path, no_model):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "config.json", model_type=["qwen2"])
    with pytest.raises(ValueError, match="KerasHub cannot load"):
        load(folder)


def test_no_end_token(checkpoint, tmp_path, no_model):
    folder = copy(checkpoint("qwen2"), tmp_path)
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", chat_template=None, eos_token=None)
    with pytest.raises(ValueError, match="has no end token"):
        load(folder)


def test_unknown_architecture(checkpoint, tmp_path, no_model):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "config.json", model_type="abacus")
    with pytest.raises(ValueError, match="KerasHub cannot load .*abacus"):
        load(folder)


def test_truncated_weights_of_another_architecture(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "config.json", model_type="gpt2")
    _truncate("model.safetensors", -10)(folder)
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        load(folder)


@pytest.mark.parametrize(
    "error", [SafetensorError("damaged"), TypeError("None"), OSError("gone")]
)
def test_whatever_keras_hub_raises(tmp_path, monkeypatch, error):
    from keras_hub import models

    def from_preset(*args, **kwargs):
        raise error

    monkeypatch.setattr(models.CausalLM, "from_preset", from_preset)
    (tmp_path / "config.json").write_text('{"class_name": "A"}')
    with pytest.raises(ValueError, match="KerasHub cannot load") as caught:
        load(tmp_path)
    assert str(error) in str(caught.value)


def test_not_a_folder(tmp_path, no_model):
    with pytest.raises(ValueError, match="There is no folder 'no_preset_en'"):
        load("no_preset_en")
    with pytest.raises(ValueError, match="There is no folder"):
        load(tmp_path / "none")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file, expected"):
        load(file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(lora_rank=0), "rank has to be"),
        (dict(lora_rank=2, lora_targets="q"), "targets have to be"),
        (dict(quantize="int2", lora_rank=1), "`quantize` has to be"),
        (dict(quantize="int8"), "cannot be trained without"),
    ],
)
def test_bad_arguments(checkpoint, no_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint("qwen2"), **arguments)
