"""A tokenizer.json made of a SentencePiece model."""

import json
from collections.abc import Iterator
from typing import Any

from keras_iris.data import HubTokenizer
from keras_iris.hub.fast_tokenizer import FastTokenizer

_SPACE = "\u2581"  # what SentencePiece writes for a space


def sentencepiece_definition(model: bytes, name: str) -> dict[str, Any]:
    """The content of a tokenizer.json with the ids of a SentencePiece model.

    Control symbols become special tokens, user-defined symbols tokens that
    every text may hold.

    Args:
        model: The content of a tokenizer.model.
        name: What it is called in errors.

    Raises:
        ValueError: If it isn't a BPE model, or has settings that the
            `tokenizers` library cannot follow to the same ids.
    """
    proto = _parse(model, name)
    _check_settings(proto, name)
    trainer, kinds = proto.trainer_spec, _kinds(proto)
    has_prefix = proto.normalizer_spec.add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizers = [prepend, replace] if has_prefix else [replace]
    return {
        "version": "1.0",
        "added_tokens": _added_tokens(proto),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _start_token(proto),
        "decoder": _decoder(has_prefix),
        "model": {
            "type": "BPE",
            "unk_token": kinds["UNKNOWN"][0],
            "fuse_unk": True,
            "byte_fallback": trainer.byte_fallback,
            "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }


def adapt_sentencepiece(hub: HubTokenizer) -> FastTokenizer:
    """The tokenizer of a KerasHub tokenizer with a SentencePiece model.

    Raises:
        ValueError: As `sentencepiece_definition`.
    """
    name = f"The SentencePiece model of {type(hub.tokenizer).__name__}"
    return FastTokenizer(
        json.dumps(sentencepiece_definition(hub.tokenizer.proto, name)),
        end_token_ids=hub.end_token_ids,
        pad_token_id=hub.pad_token_id,
    )


def _parse(model: bytes, name: str) -> Any:
    # It comes with KerasHub, but takes time to import.
    from google.protobuf.message import (  # type: ignore[import-untyped]
        DecodeError,
    )
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError as error:
        raise ValueError(
            f"{name} is not a SentencePiece model ({error}). Download it again."
        ) from error
    if not proto.pieces:
        raise ValueError(
            f"{name} is not a SentencePiece model: it has no pieces. Download "
            "it again."
        )
    return proto


def _check_settings(proto: Any, name: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = _kinds(proto)
    refused = {
        "a model type other than BPE": trainer.model_type != trainer.BPE,
        f"the normalization {normalizer.name!r}": bool(
            normalizer.precompiled_charsmap
        ),
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "no escape_whitespaces": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "unused pieces": "UNUSED" in kinds,
        # `tokenizers` would put the prefix after each of them.
        "add_dummy_prefix with user-defined symbols": (
            normalizer.add_dummy_prefix and "USER_DEFINED" in kinds
        ),
    }
    found = [setting for setting, is_set in refused.items() if is_set]
    if found:
        raise ValueError(
            f"{name} has {', '.join(found)}. Expected a SentencePiece BPE "
            "model without these, as Llama, Mistral and Gemma have, because "
            "a tokenizer.json made of this one would give other ids. Put the "
            "publisher's tokenizer.json into the model's folder."
        )


def _kinds(proto: Any) -> dict[str, list[str]]:
    """The pieces by their type: NORMAL, UNKNOWN, CONTROL, BYTE, ..."""
    kinds: dict[str, list[str]] = {}
    for piece in proto.pieces:
        kinds.setdefault(piece.Type.Name(piece.type), []).append(piece.piece)
    return kinds


def _added_tokens(proto: Any) -> list[dict[str, Any]]:
    piece = proto.SentencePiece
    return [
        {
            "id": token_id,
            "content": entry.piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # User-defined symbols are found after spaces were replaced.
            "normalized": entry.type == piece.USER_DEFINED,
            "special": entry.type != piece.USER_DEFINED,
        }
        for token_id, entry in enumerate(proto.pieces)
        if entry.type in (piece.CONTROL, piece.UNKNOWN, piece.USER_DEFINED)
    ]


def _merges(proto: Any) -> list[list[str]]:
    """All pairs of pieces that make a piece, those of the best score first.

    SentencePiece keeps no merges: of neighbours whose concatenation is a
    piece it joins those with the best score.
    """
    normal = {
        entry.piece: (-entry.score, token_id)
        for token_id, entry in enumerate(proto.pieces)
        if entry.type == proto.SentencePiece.NORMAL
    }
    ordered = sorted(normal, key=lambda piece: normal[piece])
    return [
        [left, right]
        for piece in ordered
        for left, right in _halves(piece)
        if left in normal and right in normal
    ]


def _halves(piece: str) -> Iterator[tuple[str, str]]:
    for place in range(1, len(piece)):
        yield piece[:place], piece[place:]


def _start_token(proto: Any) -> dict[str, Any] | None:
    """Puts the start token before a text, where transformers adds tokens."""
    token_id = proto.trainer_spec.bos_id
    if token_id < 0:
        return None
    token = proto.pieces[token_id].piece
    start = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = (
        {"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")
    )
    second_start = {"SpecialToken": {"id": token, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second_start, second],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
        },
    }


def _decoder(has_prefix: bool) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [
        replace,
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        decoders.append(strip)
    return {"type": "Sequence", "decoders": decoders}
