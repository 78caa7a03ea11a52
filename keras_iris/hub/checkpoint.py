"""Safetensors files of a Hugging Face folder, checked before they are read."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import safetensors

from keras_iris.data.rows import shorten
from keras_iris.data.text_files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Of the folder itself, which no "../" leads out of.
_FILE_NAME = re.compile(r"[\w .+-]{1,200}\.safetensors")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = ("F64", "F32", "F16", "BF16")


def find_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Path]:
    """The file of each weight, after a look at every file's header.

    Of tied weights that are both there the values are compared.

    Args:
        folder: A Hugging Face folder.
        shapes: Names and shapes of the weights that are needed.

    Raises:
        ValueError: If a file is missing or truncated, or a weight is missing
            or has another shape.
    """
    found: dict[str, Path] = {}
    is_tied = EMBEDDING in shapes and HEAD not in shapes
    known = {**shapes, HEAD: shapes[EMBEDDING]} if is_tied else shapes
    for file in _list_files(folder):
        for name, entry in _read_header(file).items():
            if name in known:
                _check_entry(file, name, entry, known[name])
                found[name] = file
    if is_tied and HEAD in found:
        _check_tied(found)
        found.setdefault(EMBEDDING, found.pop(HEAD))
    missing = [name for name in shapes if name not in found]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(shapes)} weights, first "
            f"{missing[0]!r}. Expected the weights that its config.json "
            "describes. Download the folder again."
        )
    return found


def read_weights(
    files: Mapping[str, Path],
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of what `find_weights` gave, one file open at a time."""
    for file in dict.fromkeys(files.values()):
        with safetensors.safe_open(file, framework="np") as tensors:
            there = set(tensors.keys())
            for name in (n for n, f in files.items() if f == file):
                # Of two that share their memory some files have the head.
                yield name, tensors.get_tensor(name if name in there else HEAD)


def _check_tied(files: Mapping[str, Path]) -> None:
    """Refuses an output layer of its own, where the embedding would be it."""
    both = {name: files[name] for name in (EMBEDDING, HEAD) if name in files}
    arrays = [np.asarray(a, np.float32) for _, a in read_weights(both)]
    if not np.array_equal(arrays[0], arrays[-1], equal_nan=True):
        raise ValueError(
            f"{files[HEAD]} holds {HEAD!r}, another matrix than {EMBEDDING!r}, "
            "and config.json ties the two. Remove it if the model was trained "
            "so; if not, set tie_word_embeddings to false there, which Gemma "
            "and SmolLM3 can't have."
        )


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says of itself, `{}` if it is damaged."""
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            return dict(tensors.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return {}


def _list_files(folder: Path) -> list[Path]:
    files = [folder / name for name in _list_names(folder / INDEX_FILE)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        there = sorted(file.name for file in folder.iterdir())
        raise ValueError(
            f"{folder} lacks its weights: {', '.join(missing)}. It has "
            f"{there}. Expected safetensors files; download the folder again, "
            "or convert its weights with transformers' `save_pretrained`."
        )
    return files


def _list_names(index: Path) -> list[str]:
    # The single file goes first, as in transformers: an index beside it is
    # left over from what was saved there before.
    if (index.parent / SINGLE_FILE).is_file() or not index.is_file():
        return [SINGLE_FILE]
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    bad = [
        name
        for name in names
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name)
    ]
    if bad:
        raise ValueError(
            f"{index} has no valid 'weight_map': received "
            f"{shorten(repr(bad[0]))} in {shorten(str(weight_map))}, expected "
            "an object from weights' names to names of safetensors files in "
            "that folder. Download it again."
        )
    return sorted(set(names))


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each weight; the file's size is checked by that."""
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            slices = {n: tensors.get_slice(n) for n in tensors.keys()}
            return {
                name: (tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{file} is truncated or damaged, or not a safetensors file: "
            f"{error}. It has {file.stat().st_size} bytes. Download it again."
        ) from error


def _check_entry(
    file: Path,
    name: str,
    entry: tuple[tuple[int, ...], str],
    expected: tuple[int, ...],
) -> None:
    shape, dtype = entry
    if shape != expected:
        raise ValueError(
            f"{file} holds {name!r} with shape {shape}; config.json says "
            f"{expected}. The files belong to different models; download the "
            "folder again."
        )
    if dtype not in _FLOATS:
        raise ValueError(
            f"{file} holds {name!r} as {dtype}. Expected one of {_FLOATS}: "
            "load the checkpoint that isn't quantized."
        )
