"""Renders chat templates in a process of its own.

A template may come from a stranger. Jinja's sandbox keeps it from Python, but
not from taking hours or all memory: a process can be ended.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS = 10.0  # of so many texts
_TEXTS = 32
_MOST_SLOW = 20  # texts that took longer, before nobody waits any more
_PROGRAM = Path(__file__).with_name("template_program.py")


class RenderError(Exception):
    """A template can't be rendered.

    Args:
        reason: Why.
        index: The number of the variables that it fails for.
        is_unsafe: Whether it reaches for Python.
    """

    def __init__(self, reason: str, index: int = 0, is_unsafe: bool = False):
        super().__init__(reason)
        self.index = index
        self.is_unsafe = is_unsafe


def render(source: str, variables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a template.

    Args:
        source: In Jinja.
        variables: Those of each text; JSON values.

    Raises:
        RenderError: The source isn't a template, fails, takes longer
            than `SECONDS` or writes too much. One that has taken too long
            many times is refused from then on.
    """
    renderer = _renderer(os.getpid())
    texts: list[str] = []
    while len(texts) < len(variables):
        some = variables[len(texts) : len(texts) + _TEXTS]
        try:
            texts += renderer.render(source, some)
        except RenderError as error:
            error.index += len(texts)
            raise
    return texts


@functools.cache
def _renderer(process_id: int) -> "_Renderer":
    """That of this process: a fork can't share its parent's."""
    return _Renderer()


class _Renderer:
    """Starts the process when it's needed, and again when it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._slow: Counter[str] = Counter()

    def render(
        self, source: str, variables: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        request = json.dumps([source, *variables]).encode() + b"\n"
        line = b""
        with self._lock:
            is_slow = self._slow[source] == _MOST_SLOW
            if not is_slow:
                start = time.monotonic()
                line = self._ask(request)
                is_slow = not line and time.monotonic() - start >= SECONDS
                self._slow[source] += is_slow
        if is_slow:
            raise RenderError(
                f"it takes more than {SECONDS:g} seconds: loops or macros "
                "repeat too much, or the text is too long for it"
            )
        if not line:
            raise RenderError("it ends Python: it is nested too deeply")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise RenderError(**answer)
        return list(answer)

    def _ask(self, request: bytes) -> bytes:
        """The answer to a line, empty if the process has ended."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin and process.stdout
        timer = threading.Timer(SECONDS, process.kill)
        line = b""
        try:
            timer.start()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            timer.cancel()
            is_whole = line.endswith(b"\n")
            if not is_whole:  # it was ended, or this thread interrupted
                self._process = None
                _end(process)
        return line if is_whole else b""

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, sys.path))
        process = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl+C is for this process alone
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:
        pass  # closes its pipes
