"""Arrays in safetensors files, written whole or not at all."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from keras_iris.files import replaced

Arrays = dict[str, np.ndarray]

_TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


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
    after the other, and the file has a checksum.

    Args:
        path: The file.
        arrays: By name.
        metadata: Strings by name.

    Reference:
        The format of safetensors: the header's length in 8 bytes, the header
        in JSON, the arrays' bytes.
    """
    sources = {name: _source(arrays[name]) for name in sorted(arrays)}
    with replaced(path) as temporary, open(temporary, "r+b") as file:
        header = _header(sources, {**metadata, "xxh3": "0" * 32})
        file.write(header)
        digest = xxhash.xxh3_128()
        for source in sources.values():
            data = _bytes(source.read())
            digest.update(data)
            file.write(data)
            del data  # before the next one is read
        file.seek(0)
        file.write(_header(sources, {**metadata, "xxh3": digest.hexdigest()}))


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Reads what `write_arrays` wrote.

    Raises:
        ValueError: The file isn't whole.
    """
    metadata = read_metadata(path)
    with safe_open(path, framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    if metadata.get("xxh3") != hash_arrays(arrays):
        raise ValueError(f"{path} is damaged: its checksum is another one")
    return arrays, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The strings of a file of `write_arrays`.

    Raises:
        ValueError: The file isn't whole.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of the values, in the order of the names."""
    digest = xxhash.xxh3_128()
    for _, array in sorted(arrays.items()):
        digest.update(_bytes(array))
    return digest.hexdigest()


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
        size = (
            2 if source.dtype == "bfloat16" else np.dtype(source.dtype).itemsize
        )
        end += int(np.prod(source.shape, dtype="int64")) * size
        header[name] = {
            "dtype": _TYPES[source.dtype],
            "shape": source.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(array: np.ndarray) -> Any:
    """An array's bytes, not copied."""
    # Through bytes, as bfloat16 has no buffer.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
