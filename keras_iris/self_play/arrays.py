"""Arrays in safetensors files, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from keras_iris.files import replaced

Arrays = dict[str, np.ndarray]


def write_arrays(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes arrays and strings to a safetensors file, atomically."""
    # Not `ascontiguousarray`, which makes a vector of a scalar.
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    metadata = {**metadata, "xxh3": hash_arrays(arrays)}
    with replaced(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


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
        # As bytes, which bfloat16 has no other view of.
        flat = np.ascontiguousarray(array).reshape(-1)
        digest.update(memoryview(flat.view(np.uint8)))
    return digest.hexdigest()
