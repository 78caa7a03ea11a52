"""What an exact large batch costs beside the naive accumulation.

    python benchmarks/micro_batch.py

IRIS over a batch of B pairs in micro-batches of m = B/8, against two others:
the accumulation that takes the loss of each micro-batch by itself, which is
another objective but the cheapest that one can do, for the time; and a step
of a batch of m pairs, for the memory. Memory is XLA's temporary memory on JAX,
elsewhere the peak of the resident memory above what it was before the step, in
processes of their own whose libraries give memory back at once (TensorFlow
without oneDNN). IRIS holds a sum of gradients for each of its two terms, where
a step of m holds none yet: "activations" are the memory without these sums.
"""

import contextlib
import functools
import statistics
import time

import harness
import models
import numpy as np
import records

EXACT, NAIVE, SMALL = "exact", "naive accumulation", "batch of m"
# The sums of gradients that those hold whose memory is compared.
NUM_SUMS = {EXACT: 2, SMALL: 0}
MODEL = {
    "vocabulary": 4_096,
    "layers": 6,
    "width": 256,
    "heads": 4,
    "key_value_heads": 2,
    "inner_width": 768,
}
BATCH = {"pairs": 16, "length": 256, "prompt_length": 64}
NUM_MICRO_BATCHES = 8
TIME_LIMIT = 1.1


class Steps:
    """Train steps of one way.

    Args:
        way: `EXACT`, `NAIVE` or `SMALL`.
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
    """

    def __init__(self, way, sizes, batch):
        import keras

        import keras_iris

        class Alone(keras_iris.losses.Stream):
            """Takes every micro-batch for a batch."""

            def objective(self, y_true, y_pred, p, shift):
                weight = keras.ops.sum(p)
                return weight * iris(y_true, y_pred, p), weight, 0.0 * shift

        class NaiveIRIS(keras_iris.losses.IRIS):
            """Makes the train step add up the losses of micro-batches."""

            def streams(self):
                return [Alone((0, 1), self.risks)]

        iris = keras_iris.losses.IRIS()
        is_naive = way == NAIVE
        size = batch["pairs"] // NUM_MICRO_BATCHES
        num_pairs = size if way == SMALL else batch["pairs"]
        loss = NaiveIRIS() if is_naive else keras_iris.losses.IRIS()
        self.model = keras_iris.SelfPlayModel(models.keras_model(sizes))
        self.model.compile(
            optimizer=keras.optimizers.AdamW(1e-5),
            loss=loss,
            micro_batch_size=size,
        )
        token_ids = models.random_rows(
            num_pairs, batch["length"], sizes["vocabulary"]
        )
        dataset = models.pair_dataset(
            token_ids, batch["prompt_length"], num_pairs
        )
        self.data = dataset[0]

    def run(self, steps):
        """Seconds of a step."""
        start = time.perf_counter()
        for _ in range(steps):
            self.model.train_on_batch(*self.data)
        return (time.perf_counter() - start) / steps

    def memory_mb(self):
        """The memory of a step, and the size of its gradients, in MB."""
        self.run(steps=1)  # compiles
        variables = self.model.trainable_variables
        return {
            "step": models.step_memory_mb(self.model, self.data),
            "gradients": sum(4 * np.prod(v.shape) for v in variables) / 1e6,
        }


def _measure(backend, sizes, batch, rounds):
    """Seconds by way, a list, and MB by way."""
    start = functools.partial(
        harness.Worker,
        __file__,
        "Steps",
        backend=backend,
        sizes=sizes,
        batch=batch,
    )
    memory = {}
    for way in NUM_SUMS:
        with start(way=way, returns_memory=True) as worker:
            memory[way] = worker.call("memory_mb")
    with contextlib.ExitStack() as stack:
        workers = {
            way: stack.enter_context(start(way=way)) for way in (EXACT, NAIVE)
        }
        harness.take_turns(workers, "run", 1, steps=1)  # compiles
        seconds = harness.take_turns(workers, "run", rounds, steps=1)
    return seconds, memory


def main():
    """Measures all backends."""
    arguments = records.parse_arguments(__doc__)
    sizes, batch, rounds = MODEL, BATCH, 3
    if arguments.quick:
        sizes, rounds = models.TINY, 1
        batch = {"pairs": 16, "length": 32, "prompt_length": 8}
    rows, bars = [], []
    for backend in harness.BACKENDS:
        seconds, memory = _measure(backend, sizes, batch, rounds)
        activations = {
            way: memory[way]["step"] - sums * memory[way]["gradients"]
            for way, sums in NUM_SUMS.items()
        }
        row = {"backend": backend}
        for way, values in seconds.items():
            row[f"{way} s"] = statistics.median(values)
        row["time ratio"] = harness.median_ratio(seconds[EXACT], seconds[NAIVE])
        for way in NUM_SUMS:
            row[f"{way} MB"] = memory[way]["step"]
            row[f"{way}, activations MB"] = activations[way]
        row["activations ratio"] = activations[EXACT] / activations[SMALL]
        rows.append(row)
        bars += [
            records.bar(
                f"time over naive, {backend}",
                row["time ratio"],
                at_most=TIME_LIMIT,
            ),
            records.bar(
                f"activations over a batch of m, {backend}",
                row["activations ratio"],
                at_most=1.15,
            ),
        ]
    records.finish(
        __file__,
        arguments,
        settings={
            "model": sizes,
            "batch": batch,
            "micro_batches": NUM_MICRO_BATCHES,
            "rounds": rounds,
        },
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
