"""Tokenizers that aren't a tokenizer.json yet."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_iris.data import ChatTemplate, Tokenizer

_INSTALL = "pip install keras_iris[convert]"
# What transformers reads a vocabulary from.
_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Where a conversion shows that it splits other than its model.
_PROBES = ("", " ", "  a", "a b  c ", "Hi,\n\n\tyou: 3.14", "日本 é🙂")
# The published split expression; in families digits group differently.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
    r"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"Llama3": "{1,3}", "SmolLM3": "{1,3}", "Qwen": "", "Qwen3": ""}
_BYTE_LEVEL = ("GPT2", "OPT", "GPTNeoX")  # that of GPT-2, of `tokenizers`


def convert_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer.json that transformers makes of a folder.

    Args:
        folder: It has a vocabulary, such as a tokenizer.model.
        config: The content of its tokenizer_config.json.

    Raises:
        ValueError: If it has none, transformers isn't installed or can't
            convert it, or gives other ids than the SentencePiece model.
    """
    files = [name for name in _VOCABULARIES if (folder / name).is_file()]
    if not files:
        raise ValueError(
            f"{folder} has no tokenizer.json and no other vocabulary "
            f"({', '.join(_VOCABULARIES)}). Download it."
        )
    where = f"{folder} has no tokenizer.json, and its {files[0]}"
    try:
        import sentencepiece  # of the same extra
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{where} is converted by transformers, which isn't installed: "
            f"`{_INSTALL}`, or put the publisher's tokenizer.json beside it."
        ) from error
    # Not `AutoTokenizer` if it can be helped: transformers 5.23 converts a
    # folder of type mistral without the space before a text.
    name = str(config.get("tokenizer_class"))
    factory = getattr(transformers, name, transformers.AutoTokenizer)
    try:
        tokenizer = factory.from_pretrained(folder)
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever its classes raise
        raise ValueError(
            f"{where} can't be converted by transformers ({error}). Put the "
            "publisher's tokenizer.json beside it."
        ) from error
    _follow_spaces(definition)
    if files[0].endswith(".model"):
        model = sentencepiece.SentencePieceProcessor()
        model.Load(str(folder / files[0]))
        converted = Tokenizer(json.dumps(definition), end_token_ids=[0])
        if any(model.encode(t) != converted.encode(t) for t in _PROBES):
            raise ValueError(
                f"{where} gives other ids once transformers has converted "
                "it. Put the publisher's tokenizer.json beside it."
            )
    return dict(definition)


def _follow_spaces(definition: dict[str, Any]) -> None:
    """Puts a space before a text that has one already, as the models do.

    As published files of Llama 2 and Mistral; what transformers 5 writes
    for them instead doesn't.
    """
    splitter = definition["pre_tokenizer"] or {}
    if splitter.get("type") == "Metaspace" and not splitter["split"]:
        space = splitter["replacement"]
        replace = {"pattern": {"String": " "}, "content": space}
        normalizers: list[dict[str, Any]] = [{"type": "Replace", **replace}]
        if splitter["prepend_scheme"] != "never":
            normalizers.insert(0, {"type": "Prepend", "prepend": space})
        sequence = {"type": "Sequence", "normalizers": normalizers}
        definition |= {"normalizer": sequence, "pre_tokenizer": None}


def convert_keras_hub(hub: Any, template: ChatTemplate | None) -> Tokenizer:
    """The tokenizer of a KerasHub tokenizer.

    KerasHub 0.32 hands the split expression of its byte-pair tokenizers to
    `tokenizers` as a literal string, so that merges cross words, and its
    SentencePiece ones read special tokens as text.

    Args:
        hub: A `keras_hub.tokenizers.Tokenizer`.
        template: A chat template, whose end of turn becomes an end token.

    Raises:
        ValueError: If it is of a kind whose split isn't known, or
            `convert_folder` refuses it.
    """
    import tokenizers
    from keras_hub.tokenizers import BytePairTokenizer, SentencePieceTokenizer

    from keras_iris.hub.tokenizer_folder import template_end

    if isinstance(hub, SentencePieceTokenizer):
        definition = _convert_sentencepiece(hub)
    elif isinstance(hub, BytePairTokenizer):
        definition = _convert_byte_pairs(hub)
    else:
        raise _unknown(hub)
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.post_processor = None
    start = getattr(hub, "start_token_id", None)
    if start is not None:
        token = tokenizer.id_to_token(start)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            [token, "$A"], special_tokens=[(token, start)]
        )
    special = {token: int(hub.token_to_id(token)) for token in _special(hub)}
    names = ("end_token_id", "end_token2_id")  # Llama 3 has two
    ends: list[Any] = [*template_end(template, special)]
    ends += [getattr(hub, name, None) for name in names]
    return Tokenizer(
        str(tokenizer.to_str()),
        end_token_ids=[int(i) for i in ends if i is not None],
        pad_token_id=int(getattr(hub, "pad_token_id", 0) or 0),
    )


def _special(hub: Any) -> set[str]:
    more = hub.get_config().get("unsplittable_tokens")
    return {*hub.special_tokens, *(more or ())}


def _unknown(hub: Any) -> ValueError:
    return ValueError(
        f"How a {type(hub).__name__} of KerasHub splits texts isn't known "
        "here, and KerasHub 0.32 itself gives other ids than the models were "
        "trained on. Load the model's Hugging Face folder instead."
    )


def _convert_sentencepiece(hub: Any) -> str:
    family = "Gemma" if type(hub).__name__.startswith("Gemma") else "Llama"
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tokenizer.model").write_bytes(hub.proto)
        config = {"tokenizer_class": f"{family}Tokenizer"}
        return json.dumps(convert_folder(Path(name), config))


def _convert_byte_pairs(hub: Any) -> str:
    import tokenizers
    from tokenizers import pre_tokenizers

    family = type(hub).__name__.removesuffix("Tokenizer").removesuffix("Moe")
    is_split = family in _DIGITS
    if not is_split and family not in _BYTE_LEVEL:
        raise _unknown(hub)
    merges = [tuple(m.split(" ")) for m in hub.merges if "#version:" not in m]
    model = tokenizers.models.BPE(
        dict(hub.vocabulary), merges, ignore_merges=family == "Llama3"
    )
    tokenizer = tokenizers.Tokenizer(model)
    splitter: Any = pre_tokenizers.ByteLevel(
        add_prefix_space=hub.add_prefix_space, use_regex=not is_split
    )
    if is_split:
        words = tokenizers.Regex(_WORDS.format(digits=_DIGITS[family]))
        split = pre_tokenizers.Split(words, "isolated")
        splitter = pre_tokenizers.Sequence([split, splitter])
    if family.startswith("Qwen"):
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(_special(hub), key=hub.token_to_id))
    return str(tokenizer.to_str())
