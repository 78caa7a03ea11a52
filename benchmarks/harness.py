"""Contestants in processes of their own, and what they need of memory.

A contestant is a class of a benchmark's script. It runs in a worker process
of its own, because a process has one Keras backend and its memory is its own
only there. Workers stay warm and wait for calls, so that contestants take
turns and a busy minute of the machine falls on all of them.
"""

import ctypes
import functools
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
BACKENDS = ("jax", "tensorflow", "torch")
GPU_BACKENDS = ("jax", "torch")
# For `memory_above`: libraries give back at once what they no longer use, which
# takes time. Of glibc; with oneDNN, TensorFlow's allocator keeps everything.
RETURNS_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
# The other way round: what a step gave back, the next one gets without asking
# the system for it, and in pages of 2 MB. Of glibc 2.35 or newer.
KEEPS_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0"
    ":glibc.malloc.trim_threshold=1000000000000"
    ":glibc.malloc.arena_max=1"
    ":glibc.malloc.hugetlb=1"
}
# A worker's device. JAX takes as much of a GPU's memory as it needs.
_ON_GPU = "KERAS_IRIS_BENCHMARK_ON_GPU"
_ENVIRONMENTS = {
    "cpu": {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"},
    "gpu": {
        _ON_GPU: "1",
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}


class Worker:
    """A process that holds one contestant.

    Args:
        script: The `__file__` of the benchmark that defines the contestant.
        contestant: The name of its class.
        backend: The value of `KERAS_BACKEND`.
        device: "cpu" or "gpu".
        environment: More variables for the process.
        **settings: What the class is called with.
    """

    def __init__(
        self,
        script,
        contestant,
        *,
        backend="torch",
        device="cpu",
        environment=None,
        **settings,
    ):
        self.name = f"{contestant} on {backend}"
        # Of interest only if the worker fails.
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(FOLDER / "harness.py"),
                Path(script).stem,
                contestant,
                json.dumps(settings),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "TOKENIZERS_PARALLELISM": "false",
                **os.environ,
                "KERAS_BACKEND": backend,
                **_ENVIRONMENTS[device],
                **(environment or {}),
            },
        )
        self._is_ready = False

    def wait(self):
        """Until the contestant is there. Workers start side by side."""
        if not self._is_ready:
            self._receive()
            self._is_ready = True

    def call(self, method, **arguments):
        """Calls a method of the contestant; gives what it returns."""
        self.wait()
        request = json.dumps({"method": method, "arguments": arguments})
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._receive()

    def close(self):
        """Tells it to end, without waiting."""
        self._process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()
        self._process.wait()
        self._errors.close()

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(
                f"The worker of {self.name} ended with code {code}, expected "
                "an answer; -9 is mostly a lack of memory. Its last lines: "
                + self._errors.read()[-3000:]
            )
        return json.loads(line)


def runs(workers):
    """The `run` of each worker, by name; all have started by then.

    Nobody is timed while others start.
    """
    for worker in workers.values():
        worker.wait()
    return {
        name: functools.partial(worker.call, "run")
        for name, worker in workers.items()
    }


def take_turns(calls, rounds):
    """Makes calls in turn, `rounds` times.

    Each is made twice, and the second counts. Before the first a contestant
    paused: what it had given back to the system takes time to get again,
    seconds on a virtual machine.

    Args:
        calls: Functions without arguments, by name.
        rounds: How often. Every second round goes backwards.

    Returns:
        The answers by name, one a round.
    """
    answers = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            calls[name]()
            answers[name].append(calls[name]())
    return answers


def median_ratio(values, others):
    """The median of the ratios of two contestants, round by round."""
    pairs = zip(values, others, strict=True)
    return statistics.median(value / other for value, other in pairs)


def is_on_gpu():
    """Whether this worker is to compute on a GPU."""
    return _ON_GPU in os.environ


def resident_mb():
    """Resident memory of this process in MB; on a GPU, that of its arrays."""
    if is_on_gpu():
        return _gpu_mb("in_use")
    return _status("VmRSS")


def reset_peak():
    """Starts a new measurement of `peak_mb`.

    On a GPU it goes on from the start: JAX can't do otherwise, and what a
    graph of PyTorch uses again isn't counted when it is used.
    """
    if not is_on_gpu():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb():
    """The largest `resident_mb` since `reset_peak`."""
    if is_on_gpu():
        return _gpu_mb("peak")
    return _status("VmHWM")


def synchronize():
    """Waits for the work that PyTorch has given to a GPU."""
    if is_on_gpu() and not _is_jax():
        import torch

        torch.cuda.synchronize()


def memory_above(function):
    """What a call needs on top of what the process holds before it.

    Args:
        function: Called without arguments.

    Returns:
        MB at the peak, and the result.
    """
    # Else the allocator serves the call from what an earlier one gave back.
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before = resident_mb()
    result = function()
    return peak_mb() - before, result


def _is_jax():
    return os.environ["KERAS_BACKEND"] == "jax"


def _gpu_mb(kind):
    if _is_jax():
        import jax

        statistics = jax.local_devices()[0].memory_stats()
        names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
        return statistics[names[kind]] / 1e6
    import torch

    functions = {
        "in_use": torch.cuda.memory_allocated,
        "peak": torch.cuda.max_memory_allocated,
    }
    return functions[kind]() / 1e6


def _status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 / 1e6


def _serve(module, contestant, settings):
    """The worker's side: builds the contestant, then answers calls."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    instance = getattr(importlib.import_module(module), contestant)(
        **json.loads(settings)
    )
    answers.write("null\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        result = getattr(instance, request["method"])(**request["arguments"])
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
