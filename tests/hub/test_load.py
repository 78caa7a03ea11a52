"""LoRA, quantization, rematerialisation, sources and bad input of `load`."""

import importlib
import json
import re
import shutil
import struct

import keras
import numpy as np
import pytest
from reference import logits_of, random_ids

from keras_iris.data import HubTokenizer
from keras_iris.hub import load

ARCHITECTURES = ("mistral", "qwen2", "llama", "gemma")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
# 8 and 4 bits for each weight, 8 for each activation; logits are of size 3
INT8_TOLERANCE = 0.3
INT4_TOLERANCE = 3.0


@every_architecture
def test_lora_trains_adapters_only(checkpoint, architecture):
    folder = checkpoint(architecture)
    causal_lm = load(folder, dtype="float32", lora_rank=2)
    names = {variable.name for variable in causal_lm.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b"}
    # query and value of 2 layers, 2 factors each
    assert len(causal_lm.trainable_variables) == 8
    token_ids = random_ids()
    np.testing.assert_array_equal(
        logits_of(causal_lm, token_ids),
        logits_of(load(folder, dtype="float32"), token_ids),
    )


@pytest.mark.parametrize(
    "quantize, tolerance",
    [
        ("int8", INT8_TOLERANCE),
        pytest.param("int4", INT4_TOLERANCE, marks=pytest.mark.slow),
    ],
)
def test_quantized_lora(checkpoint, quantize, tolerance):
    folder = checkpoint("qwen2")
    causal_lm = load(folder, dtype="float32", lora_rank=2, quantize=quantize)
    token_ids = random_ids()
    logits = logits_of(load(folder, dtype="float32"), token_ids)
    difference = np.abs(logits_of(causal_lm, token_ids) - logits).max()
    assert 0 < difference < tolerance
    kernels = [v for v in causal_lm.variables if v.name == "kernel"]
    assert len(kernels) == 2 * 7
    assert all(v.dtype == "int8" for v in kernels)
    assert causal_lm.backbone.token_embedding.embeddings.dtype == "float32"
    # the adapters of a quantized model train
    before = [keras.ops.copy(v) for v in causal_lm.trainable_variables]
    causal_lm.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    causal_lm.train_on_batch(inputs, np.roll(token_ids, -1, axis=1))
    for variable, value in zip(
        causal_lm.trainable_variables, before, strict=True
    ):
        if variable.name == "lora_kernel_b":  # A starts behind a zero B
            assert keras.ops.max(keras.ops.abs(variable - value)) > 0


def test_bfloat16(checkpoint):
    causal_lm = load(checkpoint("gemma"), dtype="bfloat16")
    assert {v.dtype for v in causal_lm.variables} == {"bfloat16"}


def test_attributes(checkpoint):
    folder = checkpoint("qwen2")
    causal_lm = load(str(folder))
    assert causal_lm.source == folder
    assert causal_lm.preprocessor is None
    tokenizer = causal_lm.tokenizer
    assert tokenizer.fingerprint() == load(folder).tokenizer.fingerprint()
    other = load(checkpoint("llama")).tokenizer
    assert tokenizer.fingerprint() != other.fingerprint()


def test_template_is_optional(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "tokenizer_config.json", chat_template=None)
    causal_lm = load(folder)
    assert causal_lm.chat_template is None
    ids = [causal_lm.tokenizer.encode(t)[0] for t in ("<|endoftext|>",)]
    assert causal_lm.tokenizer.end_token_ids[1] == ids[0]


def test_special_tokens_of_the_tokenizer_config(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    size = load(folder).tokenizer.vocabulary_size
    extra = {"content": "<|extra|>", "special": True}
    edit(
        folder / "tokenizer_config.json",
        added_tokens_decoder={str(size): extra},
    )
    tokenizer = load(folder).tokenizer
    assert tokenizer.encode("<|extra|>") == [size]
    extra["content"] = "<|im_end|>"
    edit(
        folder / "tokenizer_config.json",
        added_tokens_decoder={str(size): extra},
    )
    with pytest.raises(ValueError, match=f"'<.im_end.>' the id {size}"):
        load(folder)


def test_old_configs(checkpoint, tmp_path):
    # without what transformers 5 adds
    folder = copy(checkpoint("mistral"), tmp_path)
    edit(folder / "config.json", rope_parameters=None, rope_theta=10000.0)
    token_ids = random_ids()
    np.testing.assert_array_equal(
        logits_of(load(folder, dtype="float32"), token_ids),
        logits_of(load(checkpoint("mistral"), dtype="float32"), token_ids),
    )


def test_hugging_face_repository(checkpoint, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repository, *, allow_patterns, ignore_patterns):
        asked.append((repository, "*.safetensors" in allow_patterns))
        if repository == "org/none":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(checkpoint("qwen2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    causal_lm = load("hf://org/name")
    assert causal_lm.source == checkpoint("qwen2")
    assert asked == [("org/name", False), ("org/name", True)]
    with pytest.raises(ValueError, match="Cannot download 'org/none'"):
        load("hf://org/none")


def make_keras_preset(folder, architecture):
    """A KerasHub preset of a checkpoint's vocabulary, with random weights."""
    import keras_hub

    models, tokenizers = keras_hub.models, keras_hub.tokenizers
    sizes = dict(
        vocabulary_size=640,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
    )
    if architecture == "mistral":
        backbone = models.MistralBackbone(**sizes)
        tokenizer = tokenizers.MistralTokenizer(str(folder / "tokenizer.model"))
        preprocessor = models.MistralCausalLMPreprocessor(tokenizer)
        return models.MistralCausalLM(backbone, preprocessor=preprocessor)
    backbone = models.QwenBackbone(**sizes)
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in content["added_tokens"]}
    tokenizer = tokenizers.QwenTokenizer(
        vocabulary={**content["model"]["vocab"], **special},
        merges=[" ".join(pair) for pair in content["model"]["merges"]],
        unsplittable_tokens=list(special),
    )
    preprocessor = models.QwenCausalLMPreprocessor(tokenizer)
    return models.QwenCausalLM(backbone, preprocessor=preprocessor)


# Keras 3.15 converts its variables to NumPy 2 in an old way.
saves_preset = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")


@saves_preset
def test_keras_preset_with_byte_pairs(checkpoint, tmp_path):
    from reference import expected_tokenizer
    from tokenizer_texts import TEXTS

    source = checkpoint("qwen2")
    original = make_keras_preset(source, "qwen2")
    original.save_to_preset(str(tmp_path))
    causal_lm = load(tmp_path)
    expected = expected_tokenizer(source)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids
    token_ids = random_ids()
    np.testing.assert_array_equal(
        logits_of(causal_lm, token_ids), logits_of(original, token_ids)
    )


# KerasHub 0.32 leaves tokenizer.model open.
@saves_preset
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_keras_preset_with_sentencepiece(checkpoint, tmp_path):
    original = make_keras_preset(checkpoint("mistral"), "mistral")
    original.save_to_preset(str(tmp_path))
    tokenizer = load(tmp_path).tokenizer
    assert isinstance(tokenizer, HubTokenizer)
    assert tokenizer.encode("</s>") == [2]


def test_other_architectures_pass_with_a_warning(tmp_path):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=300,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    words = ["<|endoftext|>", "a", "b", "ab"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.warns(UserWarning, match="type 'gpt2'"):
        causal_lm = load(tmp_path)
    assert causal_lm.tokenizer.encode("ab") == [3]


# Bad input: one clear error each, before a model is built.


@pytest.fixture
def no_model(monkeypatch):
    def make_causal_lm(*args, **kwargs):
        raise AssertionError("a model was built before the error")

    module = importlib.import_module("keras_iris.hub.load")
    monkeypatch.setattr(module, "make_causal_lm", make_causal_lm)


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)


def edit(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    content = {k: v for k, v in content.items() if v is not None}
    file.write_text(json.dumps(content))


BAD_CONFIGS = {
    "sliding window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "use_sliding_window=True, expected False",
    ),
    "layer types": (
        "qwen2",
        dict(layer_types=["full_attention", "sliding_attention"]),
        "use_sliding_window=True, expected False",
    ),
    "activation": ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "biases": ("llama", dict(attention_bias=True), "attention_bias=True"),
    "head size": ("qwen2", dict(head_dim=8), "head_dim=8 where"),
    "epsilon": ("gemma", dict(rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
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
    "incomplete": ("llama", dict(hidden_size=None), "no entry 'hidden_size'"),
    "other shapes": ("llama", dict(intermediate_size=128), "with shape"),
    "too many layers": ("llama", dict(num_hidden_layers=3), "lacks 9 of 29"),
    "small vocabulary": ("qwen2", dict(vocab_size=600), "with shape"),
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


def _integers(folder):
    entry = {"dtype": "I8", "shape": [640, 64], "data_offsets": [0, 40960]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(40960)
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
        _write(
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "model-00002-of-00002.safetensors"}}',
        ),
        "lacks its weights: model-00002-of-00002.safetensors",
    ),
    "truncated weights": (
        _truncate("model.safetensors", -10),
        "is truncated or damaged",
    ),
    "truncated header": (
        _truncate("model.safetensors", 100),
        "no valid header",
    ),
    "empty weights": (_truncate("model.safetensors", 0), "no valid header"),
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


def test_no_end_token(checkpoint, tmp_path, no_model):
    folder = copy(checkpoint("qwen2"), tmp_path)
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", chat_template=None, eos_token=None)
    with pytest.raises(ValueError, match="has no end token"):
        load(folder)


@pytest.mark.filterwarnings("ignore:keras_iris doesn't test")
def test_unknown_architecture(checkpoint, tmp_path, no_model):
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "config.json", model_type="abacus")
    with pytest.raises(ValueError, match="KerasHub cannot load .*abacus"):
        load(folder)


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
        (dict(lora_rank=0), "`lora_rank` has to be"),
        (dict(lora_rank=2.0), "`lora_rank` has to be"),
        (dict(quantize="int2", lora_rank=1), "`quantize` has to be"),
        (dict(quantize="int8"), "cannot be trained without"),
    ],
)
def test_bad_arguments(checkpoint, no_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(checkpoint("qwen2"), **arguments)
