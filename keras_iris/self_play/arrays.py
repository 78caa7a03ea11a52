"""Arrays in safetensors files, written whole or not at all."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from keras_iris.files import replaced

Arrays = dict[str, np.ndarray]


def write_arrays(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
    """Writes arrays and strings to a safetensors file, atomically."""
    # Not `ascontiguousarray`, which makes a vector of a scalar.
    arrays = {k: np.asarray(v, order="C") for k, v in arrays.items()}
    with replaced(path) as temporary:
        temporary.write_bytes(save(arrays, metadata=metadata))


def read_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Reads what `write_arrays` wrote.

    Raises:
        ValueError: The file isn't whole.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}
            return arrays, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
