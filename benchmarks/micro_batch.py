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
    "layers": 4,
    "width": 256,
    "heads": 4,
    "key_value_heads": 2,
    "inner_width": 768,
}
BATCH = {"pairs": 16, "length": 256, "prompt_length": 64}
NUM_MICRO_BATCHES = 8
TIME_LIMIT = 1.1


class Steps:
    """Train steps of all ways.

    Args:
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
    """

    def __init__(self, sizes, batch):
        import keras_iris  # noqa: F401 (before the first call)

        self.sizes, self.batch = sizes, batch
        self.made = {}

    def run(self, way):
        """Seconds of a step."""
        model, data = self._model(way)
        start = time.perf_counter()
        model.train_on_batch(*data)
        return time.perf_counter() - start

    def memory_mb(self, way):
        """The memory of a step, and the size of its gradients, in MB."""
        self.run(way)  # compiles
        model, data = self._model(way)
        sizes = [np.prod(v.shape) for v in model.trainable_variables]
        return {
            "step": models.step_memory_mb(model, data),
            "gradients": 4 * sum(sizes) / 1e6,
        }

    def _model(self, way):
        """The compiled model and its batch."""
        if way not in self.made:
            self.made[way] = self._make(way)
        return self.made[way]

    def _make(self, way):
        import keras

        import keras_iris
        from keras_iris.losses.stream import Stream

        class Alone(Stream):
            """Takes every micro-batch for a batch."""

            def objective(self, y_true, y_pred, p, shift):
                weight = keras.ops.sum(p)
                return weight * iris(y_true, y_pred, p), weight, 0.0 * shift

        class NaiveIRIS(keras_iris.losses.IRIS):
            """Makes the train step add up the losses of micro-batches."""

            def streams(self, y_true, y_pred):
                return [Alone((0, 1), self.risks)]

        iris = keras_iris.losses.IRIS()
        batch = self.batch
        size = batch["pairs"] // NUM_MICRO_BATCHES
        num_pairs = size if way == SMALL else batch["pairs"]
        loss = NaiveIRIS() if way == NAIVE else iris
        model = keras_iris.SelfPlayModel(models.keras_model(self.sizes))
        model.compile(
            optimizer=keras.optimizers.AdamW(1e-5),
            loss=loss,
            micro_batch_size=size,
        )
        token_ids = models.random_rows(
            num_pairs, batch["length"], self.sizes["vocabulary"]
        )
        dataset = models.pair_dataset(
            token_ids, batch["prompt_length"], num_pairs
        )
        return model, dataset[0]


def _measure(backend, rounds, **settings):
    """Seconds by way, a list, and MB by way."""
    with contextlib.ExitStack() as stack:
        timed, lean = (
            stack.enter_context(
                harness.Worker(
                    __file__,
                    "Steps",
                    backend=backend,
                    environment=environment,
                    **settings,
                )
            )
            for environment in (None, harness.RETURNS_MEMORY)
        )
        memory = {way: lean.call("memory_mb", way=way) for way in NUM_SUMS}
        calls = {
            way: functools.partial(timed.call, "run", way=way)
            for way in (EXACT, NAIVE)
        }
        return harness.take_turns(calls, rounds), memory


def main():
    """Measures all backends."""
    arguments = records.parse_arguments(__doc__)
    sizes, batch, rounds = MODEL, BATCH, 2
    if arguments.quick:
        sizes, rounds = models.TINY, 1
        batch = {"pairs": 16, "length": 32, "prompt_length": 8}
    rows, bars = [], []
    for backend in harness.BACKENDS:
        seconds, memory = _measure(backend, rounds, sizes=sizes, batch=batch)
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
