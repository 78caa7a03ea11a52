"""TensorFlow's lines are left out of a start, and nothing else is.

Except for the first test, a module of a few lines is TensorFlow: what it
writes and how it ends is the test's.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[1]
LINES = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written
I0000 00:00:1795811823.030188   12313 cudart_stub.cc:31] Could not find cuda
W0000 00:00:1795811823.030188   12313 cpu_feature_guard.cc:31] Not optimized
To enable the following instructions: AVX2 FMA, rebuild TensorFlow
"""
REST = b"I am no log line\nE0000 an error is one\n\xff\0 bytes\nno end"


@pytest.fixture
def start(tmp_path):
    """Runs a program with a TensorFlow of its own."""

    def run(code, tensorflow, **variables):
        body = f"import os, sys\nos.write(2, {LINES + REST!r})\n{tensorflow}"
        (tmp_path / "tensorflow.py").write_text(body)
        return _run(code, str(tmp_path), **variables)

    return run


def _run(code, *folders, **variables):
    kept = {name: os.environ[name] for name in ("PATH", "HOME")}
    path = os.pathsep.join((str(ROOT), *folders))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": path, **variables},
        capture_output=True,
        timeout=120,
    )


BACKEND = keras.backend.backend()


@pytest.mark.skipif(BACKEND == "jax", reason="in tests/test_architecture.py")
def test_a_start_is_quiet():
    """With the real one, and a part of the package that is imported alone."""
    code = "from keras_iris import losses; import keras, keras_hub"
    result = _run(
        f"{code}; import keras_iris; keras_iris.load", KERAS_BACKEND=BACKEND
    )
    assert (result.returncode, result.stderr) == (0, b"")


IMPORT = "import keras_iris, tensorflow"


@pytest.mark.once
@pytest.mark.parametrize(
    ("tensorflow", "status", "further"),
    [
        ("", 0, b""),
        ("print('Keras', file=sys.stderr)", 0, b"Keras\n"),
        (
            "import threading\n"
            "t = threading.Thread(target=os.write, args=(2, b': thread'))\n"
            "t.start(); t.join()",
            *(0, b"no end: thread\n"),
        ),
        ("raise ImportError('reason')", 1, b"ImportError: reason\n"),
        ("sys.exit(3)", 3, b"no end\n"),
        ("os._exit(4)", 4, b"no end\n"),
        ("os.abort()", -signal.SIGABRT, b"no end\n"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, b"no end\n"),
    ],
)
def test_all_else_comes_through(tensorflow, status, further, start):
    result = start(IMPORT, tensorflow)
    assert result.returncode == status
    assert result.stderr.startswith(REST)
    assert result.stderr.endswith(further)
    assert b"absl" not in result.stderr


@pytest.mark.once
@pytest.mark.parametrize(
    ("code", "variables"),
    [
        ("import tensorflow, keras_iris", {}),  # not by us
        (IMPORT, {"TF_CPP_MIN_LOG_LEVEL": "0"}),  # wanted
        (IMPORT, {"PATH": ""}),  # no grep
    ],
)
def test_lines_that_are_shown(code, variables, start):
    assert start(code, "", **variables).stderr == LINES + REST


@pytest.mark.once
def test_afterwards_all_is_as_before(start):
    """What is written later, what tools find, and who only looks."""
    code = """
import importlib.util, os, keras_iris
assert importlib.util.find_spec("tensorflow").origin.endswith("flow.py")
before = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
import tensorflow
os.write(2, b"I0000 later")
assert "os.write" in tensorflow.__loader__.get_source("tensorflow")
after = sorted(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
assert before == after, (before, after)
"""
    result = start(code, "")
    assert result.stderr == REST + b"\nI0000 later"
    assert result.returncode == 0


@pytest.mark.once
def test_standard_error_that_is_closed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("print('imported')")
    result = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" 2>&-', sys.executable, IMPORT],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
    )
    assert (result.returncode, result.stdout) == (0, b"imported\n")
