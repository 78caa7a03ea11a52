"""The tokenizer's files in an exported folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import keras

from keras_iris.data import ChatTemplate, HubTokenizer
from keras_iris.data.text_files import read_json
from keras_iris.hub.fast_tokenizer import FastTokenizer
from keras_iris.hub.sentencepiece_definition import adapt_sentencepiece

_COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_CHAT_TEMPLATE = "chat_template.jinja"


def write_tokenizer(
    causal_lm: keras.Model, source: Path | None, folder: Path
) -> None:
    """Writes tokenizer, chat template and generation config.

    Args:
        causal_lm: Its `tokenizer` and `chat_template`, where it has them, are
            written; of a model without, only the source's files are.
        source: A Hugging Face folder whose tokenizer files are copied, if it
            has a tokenizer.json.
        folder: Where to write.
    """
    from keras_hub.tokenizers import SentencePieceTokenizer

    tokenizer = getattr(causal_lm, "tokenizer", None)
    template = getattr(causal_lm, "chat_template", None)
    if isinstance(tokenizer, HubTokenizer) and isinstance(
        tokenizer.tokenizer, SentencePieceTokenizer
    ):
        tokenizer = adapt_sentencepiece(tokenizer)
    # Of a tokenizer.model alone, other programs make tokenizers that differ.
    is_made = source is None or not (source / "tokenizer.json").is_file()
    if is_made and isinstance(tokenizer, FastTokenizer):
        _write_fast(tokenizer, template, folder)
    elif source is not None:
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if template is not None:
        (folder / _CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    generation: dict[str, Any] = {}
    if source is not None:
        generation = read_json(source / "generation_config.json")
    if tokenizer is not None:
        generation["eos_token_id"] = list(tokenizer.end_token_ids)
        generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    if generation:
        _write_json(folder / "generation_config.json", generation)


def _write_fast(
    tokenizer: FastTokenizer, template: ChatTemplate | None, folder: Path
) -> None:
    definition = tokenizer.definition()
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.token(tokenizer.end_token_ids[0]),
        "pad_token": tokenizer.token(tokenizer.pad_token_id),
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        tokens = {
            "bos_token": template.bos_token,
            "eos_token": template.eos_token,
        }
        tokens |= template.other_tokens
        config |= {name: text for name, text in tokens.items() if text}
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
