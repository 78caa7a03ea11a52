"""SentencePiece models as `tokenizers` files, against sentencepiece itself."""

import io
import json

import keras_hub
import pytest
import sentencepiece
import tiny_models
from reference import expected_tokenizer
from tiny_checkpoints import copy
from tokenizer_texts import TEXTS

from keras_iris.data import ChatTemplate, HubTokenizer
from keras_iris.hub import export, load
from keras_iris.hub.fast_tokenizer import FastTokenizer
from keras_iris.hub.sentencepiece_definition import (
    adapt_sentencepiece,
    sentencepiece_definition,
)

# Keras 3.15 converts its variables to NumPy 2 in an old way.
saves_preset = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

GEMMA = dict(
    add_dummy_prefix=False,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    pad_piece="<pad>",
    eos_piece="<eos>",
    bos_piece="<bos>",
    unk_piece="<unk>",
    user_defined_symbols=[
        "<start_of_turn>",
        "<end_of_turn>",
        "\n\n",
        "\u2581\u2581",
    ],
)
MODELS = {
    "prefix": dict(add_dummy_prefix=True),
    "no prefix": dict(add_dummy_prefix=False),
    "no bytes": dict(add_dummy_prefix=True, byte_fallback=False),
    "symbols": dict(
        add_dummy_prefix=False,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=["<think>", "\n", "\n\n", "\u2581\u2581", "ab"],
    ),
    "gemma": GEMMA,
}
MORE_TEXTS = ["", " ", "   a", "a   ", "\u2581 \u2581a", "x<think> y\n\n\nab"]


def train(**options):
    """A small SentencePiece model."""
    lines = [line for text in TEXTS for line in text.splitlines() if line]
    defaults = dict(
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{**defaults, **options},
    )
    return model.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name):
    model = train(**MODELS[name])
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    definition = json.dumps(sentencepiece_definition(model, "it"))
    tokenizer = FastTokenizer(definition, end_token_ids=[oracle.eos_id()])
    assert tokenizer.vocabulary_size == oracle.get_piece_size()
    for text in [*TEXTS, *MORE_TEXTS]:
        ids = oracle.encode(text)
        # sentencepiece finds control symbols in no text
        assert tokenizer.encode(text, parse_special=False) == ids, text
        if oracle.unk_id() not in ids:
            assert tokenizer.decode(ids) == oracle.decode(ids), text


def test_control_symbols_are_special_and_user_defined_ones_are_not():
    model = train(**MODELS["symbols"])
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    definition = json.dumps(sentencepiece_definition(model, "it"))
    tokenizer = FastTokenizer(definition, end_token_ids=[oracle.eos_id()])
    special = {"<unk>", "<s>", "</s>", "[INST]", "[/INST]"}
    assert set(tokenizer.special_tokens) == special
    for symbol in (*special, "<think>", "\n\n"):
        assert tokenizer.encode(symbol) == [oracle.piece_to_id(symbol)]


REFUSED = {
    "a model type other than BPE": dict(model_type="unigram"),
    "the normalization 'nmt_nfkc'": dict(normalization_rule_name="nmt_nfkc"),
    "remove_extra_whitespaces": dict(remove_extra_whitespaces=True),
    "treat_whitespace_as_suffix": dict(treat_whitespace_as_suffix=True),
    "add_dummy_prefix with user-defined": dict(user_defined_symbols=["<a>"]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_followed_is_refused(reason):
    model = train(**REFUSED[reason])
    with pytest.raises(ValueError, match=f"^it has {reason}.*the publisher's"):
        sentencepiece_definition(model, "it")


@pytest.mark.parametrize("model", [b"garbage\xff", b""])
def test_damaged_model(model):
    with pytest.raises(ValueError, match="it is not a SentencePiece model"):
        sentencepiece_definition(model, "it")


@pytest.mark.parametrize("architecture", ["mistral", "gemma"])
def test_folder_with_a_sentencepiece_model_only(
    checkpoint, tmp_path, architecture
):
    source = checkpoint(architecture)
    expected = load(source).tokenizer
    folder = copy(source, tmp_path)
    (folder / "tokenizer.json").unlink()
    causal_lm = load(folder)
    tokenizer = causal_lm.tokenizer
    assert tokenizer.end_token_ids == expected.end_token_ids
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text), text

    exported = export(causal_lm, tmp_path / "exported")
    _assert_same_ids(exported, tokenizer)
    other = load(exported).chat_template.other_tokens
    assert other["unk_token"] == "<unk>"


def test_added_tokens_of_an_older_folder(checkpoint, tmp_path):
    folder = copy(checkpoint("mistral"), tmp_path)
    (folder / "tokenizer.json").unlink()
    added = {"<|im_start|>": 632, "<|im_end|>": 633}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load(folder).tokenizer
    for text, token_id in added.items():
        assert tokenizer.encode(text) == [token_id]


def test_tokenizer_json_comes_first(checkpoint, tmp_path):
    folder = copy(checkpoint("mistral"), tmp_path)
    (folder / "tokenizer.model").write_bytes(b"")
    load(folder)


def save_preset(folder, architecture):
    """A KerasHub preset with a SentencePiece model and random weights."""
    options = (
        {} if architecture == "mistral" else {"final_logit_soft_cap": None}
    )
    causal_lm = tiny_models.make_causal_lm(
        architecture, vocabulary_size=640, num_layers=1, **options
    )
    model = train(**MODELS["prefix" if architecture == "mistral" else "gemma"])
    name = architecture.capitalize()
    tokenizer = getattr(keras_hub.tokenizers, f"{name}Tokenizer")(model)
    preprocessor = getattr(keras_hub.models, f"{name}CausalLMPreprocessor")
    causal_lm.preprocessor = preprocessor(tokenizer)
    causal_lm.save_to_preset(str(folder))
    return HubTokenizer(tokenizer)


@saves_preset
@pytest.mark.parametrize("architecture", ["mistral", "gemma"])
def test_preset_round_trip(tmp_path, architecture):
    preset = tmp_path / "preset"
    hub = save_preset(preset, architecture)
    causal_lm = load(preset)
    for text in TEXTS:
        ids = hub.encode(text, parse_special=False)
        assert causal_lm.tokenizer.encode(text, parse_special=False) == ids
    assert causal_lm.tokenizer.end_token_ids == hub.end_token_ids

    causal_lm.chat_template = ChatTemplate.named("plain")
    exported = export(causal_lm, tmp_path / "exported")
    _assert_same_ids(exported, causal_lm.tokenizer)


@saves_preset
def test_export_of_a_hub_tokenizer(tmp_path):
    preset = tmp_path / "preset"
    hub = save_preset(preset, "mistral")
    causal_lm = load(preset)
    expected = adapt_sentencepiece(hub)
    causal_lm.tokenizer = hub
    _assert_same_ids(export(causal_lm, tmp_path / "exported"), expected)


def _assert_same_ids(folder, tokenizer):
    """In keras_iris and in transformers, for the same folder."""
    again = load(folder).tokenizer
    theirs = expected_tokenizer(folder)
    assert again.fingerprint() == tokenizer.fingerprint()
    start = again.encode("<s>" if "<s>" in again.special_tokens else "<bos>")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids, text
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
    assert theirs("a").input_ids == [*start[-1:], *again.encode("a")]
