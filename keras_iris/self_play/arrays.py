"""Arrays in safetensors files, written whole or not at all."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from keras_iris.files import as_bytes, hash_arrays, replaced

Arrays = dict[str, np.ndarray]

_NO_CHECKSUM = "0" * 32  # in its place while it is made


class Source(NamedTuple):
    """An array that is read when it is written, so that memory holds one."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def write_arrays(
    path: Path,
    arrays: Mapping[str, np.ndarray | Source],
    metadata: Mapping[str, str],
) -> None:
    """Writes arrays and strings to a safetensors file, atomically.

    The library's own writer takes all arrays at once. This one takes one
    after the other, and the file has a checksum of header and arrays.

    Reference:
        The format of safetensors: the header's length in 8 bytes, the header
        in JSON, the arrays' bytes.
    """
    sources = {name: _source(arrays[name]) for name in sorted(arrays)}
    with replaced(path) as temporary, open(temporary, "r+b") as file:
        header = _header(sources, {**metadata, "xxh3": _NO_CHECKSUM})
        file.write(header)
        digest = xxhash.xxh3_128(header)
        for source in sources.values():
            data = as_bytes(source.read())
            digest.update(data)
            file.write(data)
            del data  # before the next one is read
        file.seek(0)
        file.write(_header(sources, {**metadata, "xxh3": digest.hexdigest()}))


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Reads what `write_arrays` wrote; a damaged file is a `ValueError`."""
    metadata = read_metadata(path)
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    with open(path, "rb") as file:
        size = file.read(8)
        header = size + file.read(*struct.unpack("<Q", size))
    there = metadata.get("xxh3", "")
    header = header.replace(there.encode(), _NO_CHECKSUM.encode())
    if there != hash_arrays(arrays, header):
        raise ValueError(f"{path} is damaged: its checksum is another one")
    return arrays, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The strings of a file of `write_arrays`; the checksum isn't checked."""
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def split_responses(shard: Arrays) -> list[np.ndarray]:
    """The responses of a shard, token ids of each."""
    return np.split(shard["token_ids"], np.cumsum(shard["lengths"])[:-1])


def read_responses(
    run_dir: Path, iteration: int, number: int
) -> list[np.ndarray]:
    """The responses that a run has drawn in an iteration.

    Args:
        run_dir: The run's folder.
        iteration: Number of the iteration, from 1.
        number: How many they are.

    Returns:
        Token ids of each response, in order.

    Raises:
        ValueError: Some aren't there any more, or are damaged.
    """
    folder = run_dir / f"iteration_{iteration:03d}" / "synthetic"
    try:
        responses = [
            ids
            for file in sorted(folder.glob("*.safetensors"))
            for ids in split_responses(read_arrays(file)[0])
        ]
        if len(responses) != number:
            raise ValueError(
                f"{folder} has {len(responses)} responses, expected {number}"
            )
    except ValueError as error:
        raise ValueError(
            f"{error}. The weights that made them have been trained since. "
            "Put the files of that folder back, or pass another `run_dir`."
        ) from error
    return responses


def _source(array: np.ndarray | Source) -> Source:
    if isinstance(array, Source):
        return array
    return Source(array.shape, array.dtype.name, lambda: array)


def _header(
    sources: Mapping[str, Source], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, source in sources.items():
        start = end
        # Keras brings the library by which NumPy knows bfloat16.
        dtype = np.dtype(source.dtype)
        end += int(np.prod(source.shape, dtype="int64")) * dtype.itemsize
        kind = {"bool": "BOOL", "bfloat16": "BF16"}.get(dtype.name)
        header[name] = {
            "dtype": kind or f"{dtype.kind.upper()}{8 * dtype.itemsize}",
            "shape": source.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
