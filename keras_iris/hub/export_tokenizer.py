"""The tokenizer's files in an exported folder."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import keras

from keras_iris.data import ChatTemplate, HubTokenizer
from keras_iris.hub.checkpoint import read_json
from keras_iris.hub.fast_tokenizer import FastTokenizer

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
_SENTENCEPIECE_CLASSES = {
    "GemmaTokenizer": "GemmaTokenizer",
    "MistralTokenizer": "LlamaTokenizer",
}


def write_tokenizer(
    causal_lm: keras.Model, source: Path | None, folder: Path
) -> None:
    """Writes tokenizer, chat template and generation config.

    Args:
        causal_lm: Its `tokenizer` and `chat_template`, where it has them, are
            written; of a model without, only the source's files are.
        source: A Hugging Face folder whose tokenizer files are copied.
        folder: Where to write.
    """
    tokenizer = getattr(causal_lm, "tokenizer", None)
    template = getattr(causal_lm, "chat_template", None)
    if source is not None:
        for name in _COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    elif isinstance(tokenizer, FastTokenizer):
        _write_fast(tokenizer, template, folder)
    elif isinstance(tokenizer, HubTokenizer):
        _write_sentencepiece(tokenizer, folder)
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
        config |= {name: text for name, text in tokens.items() if text}
    _write_json(folder / "tokenizer_config.json", config)


def _write_sentencepiece(tokenizer: HubTokenizer, folder: Path) -> None:
    hub = tokenizer.tokenizer
    name = _SENTENCEPIECE_CLASSES.get(type(hub).__name__)
    if name is None:
        return
    with tempfile.TemporaryDirectory() as assets:
        hub.save_assets(assets)
        shutil.copyfile(
            Path(assets) / "vocabulary.spm", folder / "tokenizer.model"
        )
    config = {
        "tokenizer_class": name,
        "add_bos_token": True,
        "bos_token": hub.start_token,
        "eos_token": hub.end_token,
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
