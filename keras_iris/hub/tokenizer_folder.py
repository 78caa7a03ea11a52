"""The tokenizer of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_iris.data import ChatTemplate, Tokenizer
from keras_iris.data.text_files import read_json
from keras_iris.hub.convert_tokenizer import convert_folder

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_RESPONSE = "The response."


def load_tokenizer(folder: Path, template: ChatTemplate | None) -> Tokenizer:
    """The tokenizer of a folder.

    Without a tokenizer.json transformers converts the folder's own files.

    A response ends with the template's end of turn, with an end token of
    generation_config.json (config.json if there is none), or that of
    tokenizer_config.json. A text starts with what tokenizer.json puts before
    it; the `add_bos_token` of tokenizer_config.json doesn't count, as in
    transformers 5.

    Args:
        folder: A Hugging Face folder.
        template: Its chat template.

    Raises:
        ValueError: If it has no tokenizer, it can't be converted, or the
            files contradict each other.
    """
    definition = read_json(folder / "tokenizer.json")
    config = read_json(folder / "special_tokens_map.json")
    config |= read_json(folder / "tokenizer_config.json")
    if not definition:
        definition = convert_folder(folder, config)
    if "model" not in definition:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has no entry 'model'. Expected a "
            "file of the `tokenizers` library; download it again."
        )
    ids = _add_tokens(definition, config)
    named = {name: ids.get(token_text(config[name]) or "") for name in config}
    end_token_ids = [
        *template_end(template, ids),
        *_generation_end(folder),
        named.get("eos_token"),
    ]
    return Tokenizer(
        json.dumps(definition),
        end_token_ids=[i for i in end_token_ids if i is not None],
        pad_token_id=named.get("pad_token"),
        folder=folder,
    )


def check_embeddings(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Refuses a tokenizer with ids that the model has no embeddings for."""
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"The tokenizer has ids up to {tokenizer.vocabulary_size - 1}, "
            f"the model {vocabulary_size} embeddings. Expected ids below "
            "that: the tokenizer belongs to another model. Put the right "
            "tokenizer files into the folder."
        )


def _add_tokens(
    definition: dict[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Adds special tokens that only tokenizer_config.json names.

    As transformers does: those of `added_tokens_decoder`, and the named ones
    that are in the vocabulary.

    Returns:
        All added tokens and their ids.
    """
    added: list[dict[str, Any]] = definition.setdefault("added_tokens", [])
    ids: dict[str, int] = {t["content"]: t["id"] for t in added}
    vocabulary = definition["model"].get("vocab", {})
    if not isinstance(vocabulary, dict):  # Unigram: a list of pairs
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    wanted = {
        entry["content"]: (int(token_id), entry)
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    }
    for name in _NAMED_TOKENS:
        text = token_text(config.get(name))
        if text and text in vocabulary:
            wanted.setdefault(text, (vocabulary[text], {}))
    for text, (token_id, entry) in wanted.items():
        if text not in ids:
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            token = {flag: bool(entry.get(flag)) for flag in flags}
            token["special"] = bool(entry.get("special", True))
            added.append({"id": token_id, "content": text, **token})
        if ids.setdefault(text, token_id) != token_id:
            raise ValueError(
                f"tokenizer_config.json gives {text!r} the id {token_id}, "
                f"tokenizer.json {ids[text]}. The files belong to different "
                "models; download them again."
            )
    added.sort(key=lambda token: int(token["id"]))
    return ids


def template_end(
    template: ChatTemplate | None, ids: Mapping[str, int]
) -> list[int]:
    """The id of the first of some tokens that follows a response, if any.

    Args:
        template: A chat template.
        ids: Tokens and their ids. Blank ones don't end a turn.
    """
    if template is None:
        return []
    try:
        text = template.render([{"role": "user", "content": "?"}], _RESPONSE)
    except ValueError:
        return []  # `template.check()` says what is wrong
    rest = text.rpartition(_RESPONSE)[2]
    places = {
        rest.find(token): i
        for token, i in ids.items()
        if token in rest and token.strip()
    }
    return [places[min(places)]] if places else []


def _generation_end(folder: Path) -> list[int]:
    ids = read_json(folder / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = read_json(folder / "config.json").get("eos_token_id")
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def token_text(token: Any) -> str | None:
    """The string of a token, which may be saved as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
