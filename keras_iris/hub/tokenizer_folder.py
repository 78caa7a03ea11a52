"""The tokenizer of a Hugging Face folder."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_iris.data import ChatTemplate, Tokenizer
from keras_iris.data.chat_template import token_text
from keras_iris.data.rows import shorten
from keras_iris.data.text_files import read_json
from keras_iris.hub.convert_tokenizer import convert_folder
from keras_iris.hub.entries import is_integer

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
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # of an old folder
        config = read_json(folder / "special_tokens_map.json") | config
    if not definition:
        definition = convert_folder(folder, config)
    if "model" not in definition:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has no entry 'model'. Expected a "
            "file of the `tokenizers` library; download it again."
        )
    try:
        if "added_tokens_decoder" not in config:
            config["added_tokens_decoder"] = _read_old(folder, config)
        ids, wanted = _read_tokens(definition, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"tokenizer.json or tokenizer_config.json in {folder} have tokens "
            f"that can't be read ({error!r}). Download them again."
        ) from error
    _add_tokens(definition["added_tokens"], ids, wanted)
    named = {name: ids.get(token_text(config[name])) for name in config}
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


def _read_tokens(
    definition: dict[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, tuple[int, dict[str, Any]]]]:
    """The added tokens, and those that have to be.

    As in transformers these are those of `added_tokens_decoder`, and the
    special ones that are in the vocabulary.

    Returns:
        The ids of added tokens; id and flags of those that have to be.
    """
    added = definition.setdefault("added_tokens", [])
    ids = {str(t["content"]): operator.index(t["id"]) for t in added}
    vocabulary = definition["model"].get("vocab", {})
    if not isinstance(vocabulary, dict):  # Unigram: a list of pairs
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    wanted = {
        str(entry["content"]): (int(token_id), entry)
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    }
    for text in _special_texts(config):
        if text in vocabulary:
            wanted.setdefault(text, (operator.index(vocabulary[text]), {}))
    return ids, wanted


def _special_texts(config: Mapping[str, Any]) -> list[str]:
    """Special tokens that tokenizer_config.json calls so."""
    named = [v for name, v in config.items() if name.endswith("_token")]
    more = config.get("additional_special_tokens") or []
    extra = config.get("extra_special_tokens")
    for entry in (extra, config.get("model_specific_special_tokens")):
        if isinstance(entry, dict):
            named += entry.values()
    if isinstance(extra, list):
        more = extra
    return list(filter(None, map(token_text, [*named, *more])))


def _read_old(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The `added_tokens_decoder` of a folder that has none, as of 2022."""
    special = _special_texts(config)
    return {
        str(token_id): {
            "content": text,
            "special": text in special,
            "normalized": text not in special,
        }
        for text, token_id in read_json(folder / "added_tokens.json").items()
    }


def _add_tokens(
    added: list[dict[str, Any]],
    ids: dict[str, int],
    wanted: Mapping[str, tuple[int, dict[str, Any]]],
) -> None:
    """Adds to tokens and ids what only tokenizer_config.json names."""
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
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            break
    else:
        return []
    ids = found if isinstance(found, list) else [found]
    if not all(map(is_integer, ids)):
        raise ValueError(
            f"{folder / name} has eos_token_id={shorten(repr(found))}, "
            "expected the id of a token, or a list of ids. Correct the entry, "
            "or download the file again."
        )
    return ids
