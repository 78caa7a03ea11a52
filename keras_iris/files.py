"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW = ".keras_iris-new"  # the end of temporary names


def check_replaceable(
    folder: Path, find_foreign: Callable[[set[str]], set[str]]
) -> None:
    """Refuses to replace what this package didn't write.

    Args:
        folder: The folder to write.
        find_foreign: Given the names in it, those that this package didn't
            write.

    Raises:
        ValueError: If there is a file, or a folder with something else in it.
    """
    if not folder.exists():
        return
    foreign = {folder.name}
    if folder.is_dir():
        foreign = find_foreign({file.name for file in folder.iterdir()})
    if foreign:
        raise ValueError(
            f"{folder} exists and wasn't written by keras_iris, or not all of "
            f"it: {', '.join(sorted(foreign)[:5])}. It isn't replaced. "
            "Expected a new or empty folder, or an earlier one of the same "
            "kind and nothing else in it. Choose another name, or remove it "
            "yourself."
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
        prefix=f".{path.name}-", suffix=_NEW, dir=path.parent
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


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left in `replaced`.

    Args:
        folder: Where no other process writes; its sub-folders, too.
    """
    for file in folder.rglob(f".*{_NEW}"):
        if file.is_file():
            file.unlink()


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if nothing goes wrong.

    A folder that is there already is replaced. What is written is on disk
    before the rename. What a killed process left is tidied up first, so one
    process at a time may write a folder.

    Args:
        folder: The folder's final place.
    """
    new = folder.with_name(f".{folder.name}{_NEW}")
    old = folder.with_name(f".{folder.name}.keras_iris-old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames
    for stale in (new, old):
        if stale.exists():
            shutil.rmtree(stale)
    new.mkdir()
    try:
        yield new
        for file in [*new.iterdir(), new]:
            _sync(file)
        _replace(folder, new, old)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _replace(folder: Path, new: Path, old: Path) -> None:
    """Renames `new` to `folder`; if that fails, `folder` is as before."""
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
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
