"""Safetensors files of a Hugging Face folder, checked before they are read."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, `{}` if there is no such file.

    Raises:
        ValueError: If it isn't a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, expected a JSON "
            "object. Download it again."
        )
    return content


def find_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Path]:
    """The file of each weight, after a look at every file's header.

    Args:
        folder: A Hugging Face folder.
        shapes: Names and shapes of the weights that are needed.

    Returns:
        A file for each name in `shapes`.

    Raises:
        ValueError: If a file is missing or truncated, or a weight is missing
            or has another shape.
    """
    found: dict[str, Path] = {}
    for file in _list_files(folder):
        for name, entry in _read_header(file).items():
            if name in shapes:
                _check_entry(file, name, entry, shapes[name])
                found[name] = file
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
    """Names and arrays, one file open at a time.

    Args:
        files: What `find_weights` returned.
    """
    for file in dict.fromkeys(files.values()):
        with safetensors.safe_open(file, framework="np") as tensors:
            for name in (n for n, f in files.items() if f == file):
                yield name, tensors.get_tensor(name)


def _list_files(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE_FILE]
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        there = sorted(file.name for file in folder.iterdir())
        raise ValueError(
            f"{folder} lacks its weights: {', '.join(missing)}. It has "
            f"{there}. Expected safetensors files; download the folder again, "
            "or convert its weights with transformers' `save_pretrained`."
        )
    return files


def _read_header(file: Path) -> dict[str, Any]:
    """The header: 8 bytes of length, then JSON."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((e["data_offsets"][1] for e in header.values()), default=0)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(
            f"{file} is not a safetensors file, or is truncated: its "
            f"{size} bytes have no valid header. Download it again."
        ) from error
    expected = 8 + length + end
    if size != expected:
        raise ValueError(
            f"{file} is truncated or damaged: it has {size} bytes, its header "
            f"promises {expected}. Download it again."
        )
    return dict(header)


def _check_entry(
    file: Path, name: str, entry: Mapping[str, Any], shape: tuple[int, ...]
) -> None:
    if tuple(entry["shape"]) != shape:
        raise ValueError(
            f"{file} holds {name!r} with shape {tuple(entry['shape'])}; "
            f"config.json says {shape}. The files belong to different models; "
            "download the folder again."
        )
    if entry["dtype"] not in _FLOATS:
        raise ValueError(
            f"{file} holds {name!r} as {entry['dtype']}. Expected one of "
            f"{_FLOATS}: load the checkpoint that isn't quantized."
        )
