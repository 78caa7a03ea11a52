"""Files that are either whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

Arrays = dict[str, np.ndarray]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a temporary path, which becomes `path` if nothing is raised.

    The file is flushed to disk before it takes the place of an old one, so
    a crash at any instant leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
