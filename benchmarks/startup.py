"""How long `import keras_iris` takes beyond `import keras_hub`.

    python benchmarks/startup.py

New processes import the one, then the other. KerasHub brings Keras, its
backend and TensorFlow; the rest is ours. (The difference between processes
that import the one or the other is the same, under more noise than there is
to measure.)
"""

import json
import os
import statistics
import subprocess
import sys

import harness
import records

_PROGRAM = """
import time
start = time.perf_counter()
import keras_hub
middle = time.perf_counter()
import keras_iris
print([middle - start, time.perf_counter() - middle])
"""


def import_seconds(backend):
    """Seconds of the two imports in a new process."""
    answer = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "KERAS_BACKEND": backend},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def main():
    """Measures all backends."""
    arguments = records.parse_arguments(__doc__)
    rounds = 1 if arguments.quick else 3
    seconds = {backend: [] for backend in harness.BACKENDS}
    for _ in range(rounds):  # the first reads the files from the disk
        for backend in harness.BACKENDS:
            seconds[backend].append(import_seconds(backend))
    rows, bars = [], []
    for backend, pairs in seconds.items():
        hub, added = (
            statistics.median(values) for values in zip(*pairs, strict=True)
        )
        rows.append(
            {
                "backend": backend,
                "keras_hub seconds": hub,
                "keras_iris adds": added,
            }
        )
        bars.append(
            records.bar(f"seconds added, {backend}", added, at_most=0.3)
        )
    records.finish(
        __file__,
        arguments,
        settings={"rounds": rounds},
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
