"""kill -9 at any instant of a whole run, which then goes on to the same end."""

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from programs import environment
from self_play_helpers import assert_same_end, lines_of, make_self_play

from keras_iris.self_play.arrays import read_arrays

pytestmark = pytest.mark.slow
KILLS = 30


class Server:
    """Runs self-play in processes of its own, which fork from one."""

    def __init__(self, log, cache):
        self._log = open(log, "wb")
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            # A kill may leave half a program in the cache.
            env=environment(JAX_COMPILATION_CACHE_DIR=str(cache)),
        )
        assert self._read() == b"ready"

    def _read(self):
        return self._process.stdout.readline().strip()

    def start(self, run_dir):
        """Begins a run; the number of its process."""
        self._process.stdin.write(f"{run_dir}\n".encode())
        return int(self._read())

    def wait(self, seconds=None):
        """How a run ended, None if it hasn't after so many seconds."""
        ends = self._process.stdout
        if seconds is not None:
            ready, _, _ = select.select([ends], [], [], seconds)
            if not ready:
                return None
        return int(self._read())

    def run(self, run_dir, seconds=None):
        """Runs in a folder, kills it after so many seconds; how it ended."""
        process = self.start(run_dir)
        end = self.wait(seconds)
        if end is None:
            with suppress(ProcessLookupError):  # it ends in this moment
                os.kill(process, signal.SIGKILL)
            end = self.wait()
        return end

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder / "log", folder / "cache")
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """A whole run, and how long one takes whose programs are compiled."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("first", "second"):
        start = time.perf_counter()
        assert server.run(folder / name) == 0
    return folder / "second", time.perf_counter() - start


def _shards(run_dir):
    return {
        str(file.relative_to(run_dir)): file
        for file in run_dir.glob("iteration_*/*/*.safetensors")
    }


def _steps(run_dir):
    """The steps' values, but for the time they took."""
    return [
        {name: v for name, v in line.items() if name != "seconds"}
        for line in lines_of(run_dir, "step")
    ]


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_instant(number, server, undisturbed, tmp_path):
    """In the `number`-th of thirty equal parts of a run, somewhere in it."""
    whole, seconds = undisturbed
    part = (number + np.random.default_rng(number).random()) / KILLS
    killed = tmp_path / "0"
    while server.run(killed, part * seconds) == 0:  # it was over before
        part *= 0.95
        killed = tmp_path / str(int(killed.name) + 1)
    there = {n: f.stat().st_mtime_ns for n, f in _shards(killed).items()}
    metrics = killed / "metrics.jsonl"
    steps = _steps(killed) if metrics.exists() else []
    print(f"killed after {part:.2f}: {len(there)} shards, {len(steps)} steps")
    assert server.run(killed) == 0

    assert_same_end(killed, whole)
    assert _steps(killed) == _steps(whole)
    expected, found = _shards(whole), _shards(killed)
    assert found.keys() == expected.keys()
    for name, file in found.items():
        ours, theirs = (read_arrays(f)[0] for f in (file, expected[name]))
        assert ours.keys() == theirs.keys()
        for part_name, array in ours.items():
            np.testing.assert_array_equal(array, theirs[part_name])
        # What was whole at the kill wasn't made again.
        assert there.get(name, file.stat().st_mtime_ns) == (
            file.stat().st_mtime_ns
        )
    assert not list(killed.rglob(".*keras_iris*"))


def test_two_processes_in_a_folder(server, undisturbed, tmp_path):
    """The second is refused, whatever the first is at; the first goes on."""
    whole, _ = undisturbed
    process = server.start(tmp_path)
    while not (tmp_path / "run.lock.json").exists():
        time.sleep(0.01)
    for _ in range(3):
        with pytest.raises(ValueError, match=f"in use by process {process} "):
            make_self_play(tmp_path).run()
        time.sleep(0.5)
    assert server.wait() == 0
    assert_same_end(tmp_path, whole)
    assert _steps(tmp_path) == _steps(whole)
