"""Exporting models to Hugging Face folders."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import keras

from keras_iris import backend
from keras_iris.data.text_files import read_json
from keras_iris.files import check_replaceable, written_beside
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.architectures import read_config
from keras_iris.hub.checkpoint import INDEX_FILE, read_metadata
from keras_iris.hub.decoder_config import DecoderConfig
from keras_iris.hub.export_tokenizer import write_tokenizer
from keras_iris.hub.shards import TYPES, write_shards
from keras_iris.hub.weights import Weight, list_weights
from keras_iris.models.checks import check_lora

# In the metadata of exported weights: the names of the files beside them.
# Other tools copy what is in config.json, but write weights anew.
_MARK = "keras_iris_export"
_HEADROOM_BYTES = 64 * 2**20  # the tokenizer and the small files


def export(
    causal_lm: keras.Model,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """Writes a folder that transformers, vLLM and `keras_iris.load` open.

    LoRA adapters are merged and quantized matrices written as floats. For
    int4 that is the same model. Keras' int8 also rounds activations when it
    computes, which no float folder can say: what other tools compute from an
    int8 model's export differs a little (SmolLM2-135M: 0.13 nats a token).

    The folder is written under another name beside its place and renamed when
    it's complete; after an error nothing of it is left. What a killed export
    left is tidied up by the next one of the same folder.

    Args:
        causal_lm: A KerasHub causal LM of an architecture in the table
            (`keras_iris.hub.architecture_table`); one from `keras_iris.load`
            brings its tokenizer and chat template.
        folder: The folder to write. If there is one already it has to be
            empty, or an earlier export with no other files in it, which is
            replaced.
        source: The Hugging Face folder whose other settings are copied.
            Defaults to the one that the model was loaded from. Tokenizer,
            template and end tokens are those of the model, which
            `SelfPlay` sets to what it trained with.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`.

    Returns:
        The folder.

    In several processes all call it, and process 0 writes.

    Raises:
        ValueError: If an argument is out of range, the model cannot be
            written in this layout, or `source` is another model's.
        OSError: If the disk is full.
    """
    folder = Path(folder).expanduser().absolute()
    if dtype not in TYPES:
        raise ValueError(
            f"`dtype` has to be one of {tuple(TYPES)}. Received: {dtype!r}"
        )
    weights = check_export(causal_lm)
    check_replaceable(folder, lambda names: _find_foreign(folder, names))
    config = read_config(causal_lm.backbone)
    source = _find_source(causal_lm, source, config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(folder.parent, weights, dtype)
    if backend.process_index() > 0:
        return _wait_for_first(weights, folder)
    with written_beside(folder) as new:
        token_ids = write_tokenizer(causal_lm, source, new)
        _write_config(config, source, new, {"dtype": dtype, **token_ids})
        names = sorted(file.name for file in new.iterdir())
        write_shards(weights, new, dtype, {_MARK: json.dumps(names)})
    backend.exchange("")
    return folder


def _wait_for_first(weights: list[Weight], folder: Path) -> Path:
    """What other processes do while process 0 writes."""
    if backend.IS_ONE_PROGRAM:
        for weight in weights:
            weight.read()  # which process 0 gathers from all devices
    backend.exchange("")
    return folder


def check_export(causal_lm: keras.Model) -> list[Weight]:
    """The weights of a model that `export` can write.

    Raises:
        ValueError: If it has adapters of Keras' own, or is of an architecture
            without a row in the table.
    """
    check_lora(causal_lm)
    backbone = causal_lm.backbone
    return list_weights(backbone, read_config(backbone))


def _find_foreign(folder: Path, names: set[str]) -> set[str]:
    """The files that no export wrote, given the names in the folder."""
    ours = set()
    beside = set(names)
    for name in names:
        if mark := read_metadata(folder / name).get(_MARK):
            ours.add(name)
            beside &= set(json.loads(mark))
    return names - ours - beside - {INDEX_FILE} if ours else names


def _find_source(
    causal_lm: keras.Model, source: str | Path | None, config: DecoderConfig
) -> Path | None:
    """The folder to copy from, if it is one of this very model."""
    is_given = source is not None
    source = source if is_given else getattr(causal_lm, "source", None)
    if source is None:
        return None
    content = read_json(Path(source).expanduser() / "config.json")
    if str(content.get("model_type")) not in ARCHITECTURES:
        if not is_given:
            return None  # KerasHub's layout
        raise ValueError(
            f"`source` has to be the Hugging Face folder of a "
            f"{config.model_type} model. {source} has no such config.json."
        )
    expected = DecoderConfig.from_json(content)
    if expected != config:
        raise ValueError(
            f"`source` is another model's folder. Expected one of {config}, "
            f"{source} has {expected}."
        )
    return Path(source).expanduser()


def _check_disk(parent: Path, weights: list[Weight], dtype: str) -> None:
    numbers = sum(weight.size for weight in weights)
    needed = numbers * TYPES[dtype].itemsize + _HEADROOM_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            f"The disk of {parent} has {free / 2**30:.1f} GiB left, expected "
            f"{needed / 2**30:.1f} GiB for this model in {dtype}. Make room, "
            "or export to another disk."
        )


def _write_config(
    config: DecoderConfig,
    source: Path | None,
    folder: Path,
    changes: dict[str, Any],
) -> None:
    content: dict[str, Any] = config.to_json()
    if source is not None:
        original = read_json(source / "config.json")
        content = {**original, "architectures": content["architectures"]}
    elif config.max_position_embeddings is None:
        warnings.warn(
            "The exported config.json doesn't say how long a sequence may be, "
            "as KerasHub's model doesn't: other tools will take their "
            f"default for {config.model_type}. Write "
            "'max_position_embeddings' into it, or pass `source`.",
            stacklevel=3,
        )
    content |= {**changes, "torch_dtype": changes["dtype"]}
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
