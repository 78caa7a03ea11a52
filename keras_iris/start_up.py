"""Keeps what TensorFlow says of its devices and builds out of a start.

TensorFlow (2.21) writes such lines to the process's standard error while it is
imported, whatever `TF_CPP_MIN_LOG_LEVEL` says, as it reads that variable only
later. KerasHub imports it on every backend.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence

# Information and warnings in the form of absl.
_LINES = (
    r"^([IW][0-9]{4} |WARNING: All log messages before absl"
    "|To enable the following)"
)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TensorFlow as others do, to be imported without its lines."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, for this one name."""
        if name != "tensorflow":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_quietly(module: types.ModuleType) -> None:
                with _without_lines():
                    execute(module)

            # Tools ask the loader for sources and files: it stays what it is.
            spec.loader.exec_module = execute_quietly  # type: ignore[method-assign]
        return spec


def keep_quiet() -> None:
    """Imports TensorFlow without its lines, whoever does it and when.

    Who has set `TF_CPP_MIN_LOG_LEVEL` below 2 wants them. Does nothing for a
    program that has imported TensorFlow before.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if level in ("2", "3") and "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


@contextlib.contextmanager
def _without_lines() -> Iterator[None]:
    """Sends what is written to standard error through `grep`.

    A process of its own passes on the rest whatever becomes of this one. Where
    it can't be started, and on Windows, all lines are shown.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    _flush()
    if process := _start_grep(stderr):
        assert process.stdin  # a pipe
        os.dup2(process.stdin.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        if process:
            # A process that was started meanwhile may go on writing.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=1)


def _start_grep(stderr: int) -> subprocess.Popen[bytes] | None:
    """A process that passes on what it gets to a file descriptor."""
    grep = shutil.which("grep") if os.name == "posix" else None
    if grep is None:
        return None
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            [grep, "-a", "-v", "-E", _LINES],
            stdin=subprocess.PIPE,
            stdout=stderr,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C"},  # bytes, whatever they say
            start_new_session=True,  # Ctrl-C is for this process
        )
    return None


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()  # which may be None, or closed
