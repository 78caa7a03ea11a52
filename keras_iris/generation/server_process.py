"""A server that this process starts, and that ends with it.

Run as a program this file is the server's guard, so it imports the standard
library only. The guard starts the command that follows, and ends it and its
child processes when its own stdin ends: when `Server.close` closes that, or
when the process that holds it has died, however it died.
"""

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

_CLOSE_SECONDS = 30.0
_KEPT_LINES = 20


class Server:
    """Starts a server and returns when it's healthy.

    Args:
        command: Of the server. `{port}` stands for a free port of 127.0.0.1,
            `{folder}` for the model's folder.
        folder: What `{folder}` stands for.
        environment: Variables on top of those of this process.
        log: The file that gets what the server prints.
        start_seconds: The longest wait for HTTP status 200 from `/health`.

    Attributes:
        url: The server's address.

    Raises:
        RuntimeError: If the server ends.
        TimeoutError: If it takes longer than `start_seconds`.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str],
        log: Path,
        start_seconds: float,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._command = [
            part.replace("{folder}", str(folder)).replace("{port}", port)
            for part in command
        ]
        with open(log, "wb") as file:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", __file__, *self._command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl+C is for this process alone
            )
        self.close = weakref.finalize(self, _close, self._guard)
        try:
            self._wait(start_seconds)
        except BaseException:
            self.close()
            raise

    def is_healthy(self) -> bool:
        """Whether it answers."""
        # This machine's own addresses aren't behind its proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.url + "/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def last_lines(self) -> str:
        """The last of what the server printed."""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        lines = "\n".join(text.splitlines()[-_KEPT_LINES:])
        return f"The server's last lines, of {self._log}:\n{lines}"

    def _wait(self, start_seconds: float) -> None:
        end = time.monotonic() + start_seconds
        name = " ".join(self._command)
        while True:
            # First: another server may have got the port of one that ended.
            is_healthy = self.is_healthy()
            if (status := self._guard.poll()) is not None:
                raise RuntimeError(
                    f"The server ended with exit status {status} before it "
                    f"was ready: {name}. Check the command and its "
                    f"environment. {self.last_lines()}"
                )
            if is_healthy:
                return
            if time.monotonic() > end:
                raise TimeoutError(
                    f"The server wasn't ready after {start_seconds} seconds "
                    f"and was ended: {name}. Raise `start_seconds`, or see "
                    f"what it waits for. {self.last_lines()}"
                )
            time.sleep(0.2)


def _close(guard: subprocess.Popen[bytes]) -> None:
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


def _guard(command: Sequence[str]) -> int:
    """Runs a command until it or stdin ends; the command's exit status."""
    parent = os.getppid()
    try:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        print(error)
        return 127
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # A fork of a parent that died can keep stdin open.
    while server.poll() is None and os.getppid() == parent:
        if select.select([sys.stdin], [], [], 0.2)[0]:
            break
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_CLOSE_SECONDS)
    return server.wait()


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
