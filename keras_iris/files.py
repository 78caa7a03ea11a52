"""Files and folders that are there whole or not at all."""

import errno
import json
import os
import platform
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import xxhash
from safetensors import SafetensorError

_NEW = ".keras_iris-new"  # the end of temporary names


def as_bytes(array: np.ndarray) -> Any:
    """An array's bytes, not copied."""
    # Through bytes, as bfloat16 has no buffer.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def hash_arrays(arrays: Mapping[str, np.ndarray], header: bytes = b"") -> str:
    """A hash of the values, in the order of the names, after a header."""
    digest = xxhash.xxh3_128(header)
    for _, array in sorted(arrays.items()):
        digest.update(as_bytes(array))
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: If it isn't one, or one that no tool of this package
            writes: Python's parser gives up at deep nesting with an error of
            its own, and at numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
def telling_of(path: Path) -> Iterator[None]:
    """Errors of the disk within say what couldn't be written.

    Args:
        path: The file or folder that is written.

    Raises:
        OSError: In place of one of the system or of safetensors, which may
            name no file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{path} can't be written: {error}. Make room, or choose a folder "
            "that can be written, and start again. What was whole on disk is "
            "as it was.",
        ) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path that becomes the file `path` if nothing goes wrong.

    What is written is on disk before the rename: a crash at any instant
    leaves the old file or the new one. Its permissions are those of any new
    file of the user.

    Args:
        path: The file's final place; its folder is made if it isn't there.

    Raises:
        OSError: It can't be written.
    """
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}{_NEW}")
    with telling_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.touch()
            mode = new.stat().st_mode
            yield new
            new.chmod(mode)  # whatever has written it
            _sync_file(new)
            new.replace(path)
        except BaseException:
            with suppress(OSError):  # the folder may be gone
                new.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left in `replaced`.

    Args:
        folder: Where no other process writes; sub-folders stay as they are.
    """
    for file in folder.glob(f".*{_NEW}"):
        if file.is_file():
            file.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; a dead process holds nothing.

    Args:
        folder: The folder, in which `run.lock` and `run.lock.json` are made.

    Raises:
        ValueError: Another process holds it; the message names host and
            process.
    """
    lock = filelock.FileLock(folder / "run.lock")
    owner = folder / "run.lock.json"
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(
            f"{folder} is in use by {_read_owner(owner)}. Wait until that has "
            "ended, or choose another folder."
        ) from error
    except (NotImplementedError, OSError) as error:
        warnings.warn(
            f"{folder} can't be locked ({error}): take care that no other "
            "process uses it.",
            stacklevel=3,
        )
    try:
        me = {"host": platform.node(), "process": os.getpid()}
        with suppress(OSError):  # it only helps another one's error
            owner.write_text(json.dumps(me))
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


def _read_owner(file: Path) -> str:
    try:
        owner = json.loads(file.read_text())
        return f"process {owner['process']} on {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if nothing goes wrong.

    A folder that is there already is replaced. What is written is on disk
    before the rename. What a killed process left is tidied up first, so one
    process at a time may write a folder.

    Args:
        folder: The folder's final place.

    Raises:
        OSError: It can't be written.
    """
    with telling_of(folder):
        yield from _written_beside(folder)


def _written_beside(folder: Path) -> Iterator[Path]:
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
        for file in new.iterdir():
            _sync_file(file)
        _sync_folder(new)
        _replace(folder, new, old)
        _sync_folder(folder.parent)
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


def _sync_file(path: Path) -> None:
    """Waits until a file is on disk."""
    # Windows syncs what is open for writing only.
    mode = "r+b" if os.access(path, os.W_OK) else "rb"
    with open(path, mode) as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Waits until a folder's entries are on disk, where a system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do some network file systems sync them
        pass
    finally:
        os.close(descriptor)


def check_room(needed: float, folder: Path) -> None:
    """Refuses a run's folder on a disk without room for it.

    Args:
        needed: Bytes.
        folder: The run's; it needn't be there.

    Raises:
        ValueError: Fewer are free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"The run needs about {needed / 2**30:.3g} GiB of disk in "
            f"{folder}, of which {free / 2**30:.3g} GiB are free. Make room, "
            "take a `run_dir` on another disk, or train LoRA adapters, whose "
            "checkpoints are small."
        )
