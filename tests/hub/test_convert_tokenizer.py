"""Tokenizers without a tokenizer.json, against their own libraries."""

import json
import sys

import keras_hub
import pytest
import sentencepiece
import tokenizers
from reference import expected_tokenizer
from tiny_checkpoints import copy, edit
from tokenizer_texts import MARKUP, TEXTS

from keras_iris.data import ChatTemplate, Tokenizer, encode_prompt
from keras_iris.hub.convert_tokenizer import convert_keras_hub
from keras_iris.hub.tokenizer_folder import load_tokenizer


@pytest.fixture
def bare_folder(checkpoint, tmp_path):
    """A checkpoint whose tokenizer.json is missing."""

    def make(architecture):
        folder = copy(checkpoint(architecture), tmp_path)
        (folder / "tokenizer.json").unlink()
        return folder

    return make


@pytest.mark.parametrize("architecture", ["mistral", "gemma"])
def test_a_sentencepiece_model(checkpoint, bare_folder, architecture):
    folder = bare_folder(architecture)
    oracle = sentencepiece.SentencePieceProcessor()
    oracle.Load(str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder, None)
    published = load_tokenizer(checkpoint(architecture), None)
    assert tokenizer.end_token_ids == published.end_token_ids
    for text in TEXTS:
        assert tokenizer.encode(text) == published.encode(text), text
        if text not in MARKUP:  # sentencepiece finds special tokens in no text
            assert tokenizer.encode(text) == oracle.encode(text), text


def test_a_conversion_with_other_ids_is_refused(bare_folder):
    """Gemma puts no space before a text, this model does."""
    folder = bare_folder("mistral")
    edit(folder / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    with pytest.raises(ValueError, match="gives other ids once transformers"):
        load_tokenizer(folder, None)


def test_byte_pairs_of_a_folder(checkpoint, bare_folder):
    folder = bare_folder("qwen2")
    model = json.loads((checkpoint("qwen2") / "tokenizer.json").read_text())
    model = model["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(merges)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    decoder = {632 + i: {"content": text} for i, text in enumerate(special)}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    tokenizer = load_tokenizer(folder, None)
    published = load_tokenizer(checkpoint("qwen2"), None)
    for text in TEXTS:
        assert tokenizer.encode(text) == published.encode(text), text


def test_without_transformers_the_command_is_named(bare_folder, monkeypatch):
    folder = bare_folder("mistral")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install keras_iris\[convert\]"):
        load_tokenizer(folder, None)


def test_no_vocabulary_at_all(bare_folder):
    """transformers 5 would make an empty one."""
    with pytest.raises(ValueError, match="no tokenizer.json and no other"):
        load_tokenizer(bare_folder("qwen2"), None)


def test_a_damaged_model(bare_folder):
    folder = bare_folder("mistral")
    (folder / "tokenizer.model").write_bytes(b"garbage\xff")
    with pytest.raises(ValueError, match="can't be converted by transformers"):
        load_tokenizer(folder, None)


def test_added_tokens_of_an_older_folder(bare_folder):
    folder = bare_folder("mistral")
    added = {"<|im_start|>": 632, "<|im_end|>": 633}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(folder, ChatTemplate.named("chatml"))
    for text, token_id in added.items():
        assert tokenizer.encode(text) == [token_id]
    assert tokenizer.end_token_ids == (633, 2)


@pytest.mark.parametrize("architecture", ["mistral", "gemma"])
def test_start_token(checkpoint, tmp_path, architecture):
    """What transformers puts before a text, whatever the config says of it."""
    folder = copy(checkpoint(architecture), tmp_path)
    for add_bos_token in (True, False):
        edit(folder / "tokenizer_config.json", add_bos_token=add_bos_token)
        ids = encode_prompt("a", load_tokenizer(folder, None))
        assert ids == expected_tokenizer(folder)("a").input_ids
    assert len(ids) == (2 if architecture == "mistral" else 1)


def hub_byte_pairs(folder, name):
    """The KerasHub tokenizer of a checkpoint with byte-level BPE."""
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in content["added_tokens"]}
    make = getattr(keras_hub.tokenizers, f"{name}Tokenizer")
    return make(
        vocabulary={**content["model"]["vocab"], **special},
        merges=[" ".join(pair) for pair in content["model"]["merges"]],
        unsplittable_tokens=list(special),
    )


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("Llama3", "llama"), ("Qwen", "qwen2"), ("Qwen3", "qwen2")],
)
def test_byte_pairs_of_keras_hub(checkpoint, name, architecture):
    folder = checkpoint(architecture)
    hub = hub_byte_pairs(folder, name)
    template = ChatTemplate.named("chatml" if "Qwen" in name else "llama3")
    tokenizer = convert_keras_hub(hub, template)
    published = load_tokenizer(folder, template)
    for text in TEXTS:
        assert tokenizer.encode(text) == published.encode(text), text
    special = set(published.special_tokens)
    assert set(tokenizer.special_tokens) == special
    assert tokenizer.end_token_ids[0] == published.end_token_ids[0]
    assert bool(tokenizer.start_token_ids) == (name == "Llama3")


def test_gpt2_of_keras_hub():
    oracle = tokenizers.ByteLevelBPETokenizer()
    options = {"vocab_size": 400, "special_tokens": ["<|endoftext|>"]}
    oracle.train_from_iterator(TEXTS, show_progress=False, **options)
    model = json.loads(oracle.to_str())["model"]
    hub = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary=model["vocab"],
        merges=[" ".join(pair) for pair in model["merges"]],
    )
    tokenizer = convert_keras_hub(hub, None)
    assert tokenizer.end_token_ids == (0,)
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert tokenizer.encode(text) == oracle.encode(text).ids, text


@pytest.mark.parametrize("name", ["Mistral", "Gemma"])
def test_sentencepiece_of_keras_hub(checkpoint, name):
    folder = checkpoint(name.lower())
    make = getattr(keras_hub.tokenizers, f"{name}Tokenizer")
    hub = make(str(folder / "tokenizer.model"))
    tokenizer = convert_keras_hub(hub, None)
    published = load_tokenizer(folder, None)
    for text in TEXTS:
        assert tokenizer.encode(text) == published.encode(text), text
    start = tokenizer.decode(tokenizer.start_token_ids)
    assert start == {"Mistral": "<s>", "Gemma": "<bos>"}[name]
    assert isinstance(tokenizer, Tokenizer)


def test_an_unknown_split_of_keras_hub_is_refused():
    hub = keras_hub.tokenizers.BytePairTokenizer(
        vocabulary={"a": 0, "b": 1, "ab": 2}, merges=["a b"]
    )
    with pytest.raises(ValueError, match="BytePairTokenizer of KerasHub spl"):
        convert_keras_hub(hub, None)
