"""The tokenizer's files in an exported folder."""

import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import keras

from keras_iris.data import ChatTemplate, Tokenizer
from keras_iris.data.text_files import read_json

# Other forms of the same vocabulary, which some programs prefer.
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt")
_TEMPLATE_FILE = "chat_template.jinja"


def write_tokenizer(
    causal_lm: keras.Model, source: Path | None, folder: Path
) -> dict[str, Any]:
    """Writes tokenizer, chat template and generation config.

    They are those that the model has and was trained with, whatever `source`
    has: a tokenizer's own folder gives the other files of its vocabulary.

    Args:
        causal_lm: One without a `tokenizer` gets the source's files.
        source: A Hugging Face folder.
        folder: Where to write.

    Returns:
        The ids of start, end and padding that belong into config.json.
    """
    tokenizer = getattr(causal_lm, "tokenizer", None)
    template = getattr(causal_lm, "chat_template", None)
    generation: dict[str, Any] = {}
    if source is not None:
        generation = read_json(source / "generation_config.json")
    ids: dict[str, Any] = {}
    if isinstance(tokenizer, Tokenizer):
        template = template and template.bind(tokenizer)
        ids = _write_definition(tokenizer, template, folder)
        ends = list(tokenizer.end_token_ids)
        generation |= {**ids, "eos_token_id": ends}
    elif tokenizer is not None:
        warnings.warn(
            f"A {type(tokenizer).__name__} can't be written: {folder} is "
            "without a tokenizer. Use a `keras_iris.data.Tokenizer`.",
            stacklevel=3,
        )
    elif source is not None:
        names = ["tokenizer.json", "tokenizer_config.json", _TEMPLATE_FILE]
        _copy(
            (*names, "special_tokens_map.json", *_VOCABULARIES), source, folder
        )
    if template is not None:
        file = folder / _TEMPLATE_FILE
        file.write_text(template.source, encoding="utf-8")
    if generation:
        _write_json(folder / "generation_config.json", generation)
    return ids


def _write_definition(
    tokenizer: Tokenizer, template: ChatTemplate | None, folder: Path
) -> dict[str, Any]:
    definition = tokenizer.definition()
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    config: dict[str, Any] = {}
    if tokenizer.folder is not None:
        _copy(_VOCABULARIES, tokenizer.folder, folder)
        config |= read_json(tokenizer.folder / "special_tokens_map.json")
        config |= read_json(tokenizer.folder / "tokenizer_config.json")
        config.pop("chat_template", None)
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    config["clean_up_tokenization_spaces"] = False
    ids = {
        "eos_token": tokenizer.end_token_ids[0],
        "pad_token": tokenizer.pad_token_id,
    }
    if tokenizer.start_token_ids:
        ids["bos_token"] = tokenizer.start_token_ids[0]
    config |= {name: tokenizer.token(i) for name, i in ids.items()}
    if template is not None:  # its text has to stay what it was
        tokens = {
            "bos_token": template.bos_token,
            "eos_token": template.eos_token,
            **template.other_tokens,
        }
        for name, text in tokens.items():
            if text and (name in template.source or name not in config):
                config[name] = text
    _write_json(folder / "tokenizer_config.json", config)
    return {f"{name}_id": token_id for name, token_id in ids.items()}


def _copy(names: Iterable[str], source: Path, folder: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
