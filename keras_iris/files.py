"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_replaceable(
    folder: Path, is_ours: Callable[[set[str]], bool]
) -> None:
    """Refuses to replace what this package didn't write.

    Args:
        folder: The folder to write.
        is_ours: Whether it is one of ours, given the names in it.

    Raises:
        ValueError: If there is a file, or a folder with something else in it.
    """
    if not folder.exists():
        return
    if folder.is_dir():
        names = {file.name for file in folder.iterdir()}
        if not names or is_ours(names):
            return
    raise ValueError(
        f"{folder} exists and wasn't written by keras_iris, so it isn't "
        "replaced. Expected a new or empty folder, or an earlier one of the "
        "same kind. Choose another name, or remove it yourself."
    )


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path that becomes the file `path` if nothing goes wrong.

    What is written is on disk before the rename: a crash at any instant
    leaves the old file or the new one.

    Args:
        path: The file's final place; its folder is made if it isn't there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.name}-", dir=path.parent
    )
    os.close(descriptor)
    new = Path(name)
    try:
        yield new
        new.chmod(0o644)
        _sync(new)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if nothing goes wrong.

    A folder that is there already is replaced. What is written is on disk
    before the rename.

    Args:
        folder: The folder's final place.
    """
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield new
        new.chmod(0o755)
        for file in [*new.iterdir(), new]:
            _sync(file)
        _replace(folder, new)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _replace(folder: Path, new: Path) -> None:
    """Renames `new` to `folder`; if that fails, `folder` is as before."""
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    folder.rename(old)  # onto an empty folder
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
