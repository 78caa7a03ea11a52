"""LoRA, quantization, rematerialisation, sources and bad input of `load`."""

import json
import shutil

import keras
import numpy as np
import pytest
from reference import expected_logits, logits_of, random_ids
from safetensors.numpy import load_file
from tiny_checkpoints import copy, edit, non_default_options
from tiny_models import make_pairs

import keras_iris
from keras_iris import losses
from keras_iris.data import (
    ChatTemplate,
    Conversation,
    tokenize,
)
from keras_iris.generation import KerasEngine
from keras_iris.hub import export, inspect, load
from keras_iris.models import SelfPlayModel

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
    assert names == {"lora_a", "lora_b"}
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
        pytest.param("int8", INT8_TOLERANCE, marks=pytest.mark.slow),
        ("int4", INT4_TOLERANCE),
    ],
)
def test_quantized_lora(checkpoint, quantize, tolerance, monkeypatch):
    # Keras collects garbage for each layer that it quantizes.
    monkeypatch.setattr("gc.collect", lambda: 0)
    folder = checkpoint("qwen2", num_hidden_layers=1)
    causal_lm = load(
        folder, dtype="float32", lora_rank=2, quantize=quantize, remat=True
    )
    token_ids = random_ids()
    logits = logits_of(load(folder, dtype="float32"), token_ids)
    difference = np.abs(logits_of(causal_lm, token_ids) - logits).max()
    assert 0 < difference < tolerance
    kernels = [v for v in causal_lm.variables if v.name == "kernel"]
    assert [v.dtype for v in kernels] == 7 * ["int8"]
    assert causal_lm.backbone.token_embedding.embeddings.dtype == "float32"
    # its adapters train; the second factors start as zeros
    second = [v for v in causal_lm.variables if v.name == "lora_b"]
    assert len(second) == 2
    model = SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.SGD(1.0), losses.IRIS(), jit_compile=False)
    model.train_on_batch(make_pairs(), np.zeros((8, 2), "float32"))
    assert all(np.abs(keras.ops.convert_to_numpy(v)).max() > 0 for v in second)


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


def test_default_template(checkpoint, tmp_path):
    # a base model: no template, and one end token, which isn't the template's
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "tokenizer_config.json", chat_template=None)
    edit(folder / "generation_config.json", eos_token_id=632)
    template = ChatTemplate.named("chatml")
    conversation = Conversation("Hello", "Hi.")
    plain = load(folder)
    assert plain.tokenizer.end_token_ids == (632,)
    causal_lm = load(folder, default_template=template)
    assert causal_lm.chat_template.source == template.source
    assert causal_lm.tokenizer.end_token_ids == (634, 632)
    (example,) = tokenize(
        [conversation],
        causal_lm.tokenizer,
        template=causal_lm.chat_template,
        max_prompt_length=64,
        max_response_length=64,
    )
    assert example.response_ids[-1] == 634
    again = load(export(causal_lm, tmp_path / "export"))
    assert again.chat_template.source == template.source
    assert again.tokenizer.end_token_ids == (634, 632)
    # one's own goes first
    own = load(checkpoint("qwen2"), default_template=template).chat_template
    assert own.source == load(checkpoint("qwen2")).chat_template.source


def test_inspect(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    (folder / "model.safetensors").unlink()
    config, tokenizer, template = inspect(folder)
    causal_lm = load(checkpoint("qwen2"))
    assert config.vocabulary_size == causal_lm.backbone.vocabulary_size
    assert tokenizer.fingerprint() == causal_lm.tokenizer.fingerprint()
    assert template.source == causal_lm.chat_template.source
    edit(folder / "tokenizer_config.json", chat_template=None)
    assert inspect(folder).chat_template is None
    template = ChatTemplate.named("chatml")
    found = inspect(folder, default_template=template)
    assert found.chat_template.source == template.source
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="truncated or damaged"):
        inspect(folder)
    edit(folder / "config.json", model_type="gpt2")
    with pytest.raises(ValueError, match="no config.json with a model_type"):
        inspect(folder)
    with pytest.raises(ValueError, match="no config.json with a model_type"):
        inspect("kaggle://a/b/c/d")


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


def test_hugging_face_repository(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.parent.mkdir()
    snapshot.symlink_to(checkpoint("qwen2"))

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        if name == "org/none":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    causal_lm = load("hf://org/name")
    assert causal_lm.source == snapshot
    assert causal_lm.commit == "0123abc"
    assert load(checkpoint("qwen2")).commit is None
    assert asked == [("org/name", None, False), ("org/name", None, True)]
    with pytest.raises(ValueError, match="Cannot download 'org/none@v1'"):
        load("hf://org/none@v1")
    asked.clear()
    inspect("hf://org/name@v1")
    inspect("hf://org/name", revision="v1")
    keras_iris.estimate("hf://org/name@v1", revision="v1")
    assert asked == 3 * [("org/name", "v1", False)]
    load("hf://org/name", revision="v1")
    assert asked[3:] == [("org/name", "v1", x) for x in (False, True)]
    for preset in ("hf://org/name@v2", snapshot, "qwen2.5_0.5b_en"):
        with pytest.raises(ValueError, match="revision.*'v1'"):
            load(preset, revision="v1")
    assert len(asked) == 5


def test_single_file_beside_an_old_index(checkpoint, tmp_path):
    """As saved again into a folder that had several files."""
    folder = copy(checkpoint("qwen2", seed=1), tmp_path)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    names = load_file(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(names, "model-1.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    token_ids = random_ids()
    for _ in range(2):
        np.testing.assert_allclose(
            logits_of(load(folder, dtype="float32"), token_ids),
            expected_logits(folder, token_ids),
            rtol=0,
            atol=1e-5,
        )
        new = checkpoint("qwen2") / "model.safetensors"
        shutil.copy(new, folder / "model.safetensors")


def test_sequences_beyond_the_longest(checkpoint):
    causal_lm = load(checkpoint("qwen2", max_position_embeddings=20))
    engine = KerasEngine(
        causal_lm,
        end_token_ids=(1,),
        max_new_tokens=8,
        batch_size=1,
        bucket_lengths=(13,),
    )
    message = "padded to 21 tokens; .* max_position_embeddings=20"
    with pytest.warns(UserWarning, match=message):
        engine.generate([[5, 6]], seed=0)
    pairs = make_pairs(length=21)
    with pytest.warns(UserWarning, match=message):
        SelfPlayModel(causal_lm)(pairs)
    SelfPlayModel(causal_lm)({k: v[..., :20] for k, v in pairs.items()})


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
    template = ChatTemplate.named("chatml")
    causal_lm = load(tmp_path, default_template=template)
    assert causal_lm.chat_template.source == template.source
    assert causal_lm.tokenizer.end_token_ids == (634, 632)
    assert load(tmp_path).tokenizer.end_token_ids == (632,)
    expected = expected_tokenizer(source)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids
    token_ids = random_ids()
    np.testing.assert_array_equal(
        logits_of(causal_lm, token_ids), logits_of(original, token_ids)
    )


@pytest.fixture
def gpt2(tmp_path):
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
    return tmp_path


def test_other_architectures_pass_with_a_warning(gpt2):
    with pytest.warns(UserWarning, match="type 'gpt2': a few tokens were"):
        causal_lm = load(gpt2, dtype="float32")
    assert causal_lm.tokenizer.encode("ab") == [3]
    assert causal_lm.chat_template is None
    template = ChatTemplate.named("chatml")
    (gpt2 / "chat_template.jinja").write_text(template.source)
    with pytest.warns(UserWarning, match="type 'gpt2'"):
        causal_lm = load(gpt2, default_template=ChatTemplate.named("spin"))
    assert causal_lm.chat_template.source == template.source
    message = "adapters of a GPT2Backbone train, but neither `save_adapter`"
    with pytest.warns(UserWarning, match=message):
        with pytest.warns(UserWarning, match="type .gpt2."):
            load(gpt2, lora_rank=2)


def test_other_architectures_are_compared(gpt2):
    """KerasHub reads no such entry; transformers does."""
    edit(gpt2 / "config.json", layer_norm_epsilon=1.0)
    with pytest.raises(ValueError, match="log-probs are off by .* nats"):
        load(gpt2, dtype="float32")


@saves_preset
def test_saved_as_a_keras_preset(checkpoint, tmp_path):
    """KerasHub's `from_preset` gives the same model, adapters are refused."""
    import keras_hub

    folder = checkpoint("gemma2", **non_default_options("gemma2"))
    causal_lm = load(folder, dtype="float32")
    causal_lm.save_to_preset(str(tmp_path / "preset"))
    again = keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset"))
    token_ids = random_ids()
    np.testing.assert_array_equal(
        logits_of(again, token_ids), logits_of(causal_lm, token_ids)
    )
    assert again.backbone.decoder_config == causal_lm.backbone.decoder_config
    adapted = load(folder, lora_rank=2)
    with pytest.raises(ValueError, match="can't hold LoRA's adapters"):
        adapted.save_to_preset(str(tmp_path / "adapted"))
    assert not (tmp_path / "adapted").exists()
