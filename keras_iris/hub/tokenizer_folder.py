"""The tokenizer and chat template of a Hugging Face folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_iris.data import ChatTemplate
from keras_iris.data.text_files import read_json
from keras_iris.hub.fast_tokenizer import FastTokenizer
from keras_iris.hub.sentencepiece_definition import sentencepiece_definition

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_RESPONSE = "The response."


def load_tokenizer(
    folder: Path, template: ChatTemplate | None
) -> FastTokenizer:
    """The tokenizer of a folder.

    Without a tokenizer.json it is made of the folder's tokenizer.model.

    A response ends with the template's end of turn, with an end token of
    generation_config.json (config.json if there is none), or that of
    tokenizer_config.json.

    Args:
        folder: A Hugging Face folder.
        template: Its chat template.

    Raises:
        ValueError: If it has neither file, the tokenizer.model can't be
            followed, or the files contradict each other.
    """
    definition = _read_definition(folder)
    config = read_json(folder / "special_tokens_map.json")
    config |= read_json(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").is_file():
        # Older folders list here what isn't in tokenizer.model.
        extra = read_json(folder / "added_tokens.json")
        config["added_tokens_decoder"] = {
            str(token_id): {"content": text} for text, token_id in extra.items()
        } | config.get("added_tokens_decoder", {})
    tokens = _add_tokens(definition, config)
    ids = {token["content"]: token["id"] for token in tokens}
    end_token_ids = [
        *template_end(template, ids),
        *_generation_end(folder),
        *_named_id(config.get("eos_token"), ids),
    ]
    pad_token_ids = _named_id(config.get("pad_token"), ids)
    return FastTokenizer(
        json.dumps(definition),
        end_token_ids=end_token_ids,
        pad_token_id=next(iter(pad_token_ids), None),
    )


def check_embeddings(tokenizer: Any, vocabulary_size: int) -> None:
    """Refuses a tokenizer with ids that the model doesn't have.

    Args:
        tokenizer: A `keras_iris.data.Tokenizer`.
        vocabulary_size: The number of the model's embeddings.

    Raises:
        ValueError: If an id is too large.
    """
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"The tokenizer has ids up to {tokenizer.vocabulary_size - 1}, "
            f"the model {vocabulary_size} embeddings. Expected ids below "
            "that: the tokenizer belongs to another model. Put the right "
            "tokenizer files into the folder."
        )


def _read_definition(folder: Path) -> dict[str, Any]:
    definition = read_json(folder / "tokenizer.json")
    if not definition:
        file = folder / "tokenizer.model"
        if file.is_file():
            return sentencepiece_definition(file.read_bytes(), str(file))
        raise ValueError(
            f"{folder} has no tokenizer.json and no tokenizer.model. Expected "
            "one of them beside the weights; download it."
        )
    if "model" not in definition:
        raise ValueError(
            f"{folder / 'tokenizer.json'} has no entry 'model'. Expected a "
            "file of the `tokenizers` library; download it again."
        )
    return definition


def _add_tokens(
    definition: dict[str, Any], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Adds special tokens that only tokenizer_config.json names.

    As transformers does: those of `added_tokens_decoder`, and the named ones
    that are in the vocabulary.

    Returns:
        All added tokens.
    """
    added: list[dict[str, Any]] = definition.setdefault("added_tokens", [])
    ids = {token["content"]: token["id"] for token in added}
    vocabulary = definition["model"].get("vocab", {})
    if not isinstance(vocabulary, dict):  # Unigram: a list of pairs
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    wanted = {
        entry["content"]: (int(token_id), entry)
        for token_id, entry in config.get("added_tokens_decoder", {}).items()
    }
    for name in _NAMED_TOKENS:
        text = token_text(config.get(name))
        if text in vocabulary:
            wanted.setdefault(text, (vocabulary[text], {}))
    for text, (token_id, entry) in wanted.items():
        if ids.setdefault(text, token_id) != token_id:
            raise ValueError(
                f"tokenizer_config.json gives {text!r} the id {token_id}, "
                f"tokenizer.json {ids[text]}. The files belong to different "
                "models; download them again."
            )
        if all(token["content"] != text for token in added):
            added.append(_added_token(text, token_id, entry))
    added.sort(key=lambda token: int(token["id"]))
    return added


def _added_token(
    text: str, token_id: int, entry: Mapping[str, Any]
) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {
        "id": token_id,
        "content": text,
        **{flag: bool(entry.get(flag, False)) for flag in flags},
        "special": bool(entry.get("special", True)),
    }


def template_end(
    template: ChatTemplate | None, ids: Mapping[str, int]
) -> list[int]:
    """The id of the first added token that follows a response.

    Args:
        template: A chat template.
        ids: Added tokens and their ids. Blank ones don't end a turn.

    Returns:
        One id, or none.
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


def _named_id(token: Any, ids: Mapping[str, int]) -> list[int]:
    text = token_text(token)
    return [ids[text]] if text is not None and text in ids else []


def token_text(token: Any) -> str | None:
    """The string of a token, which may be saved as an object."""
    return token.get("content") if isinstance(token, dict) else token
