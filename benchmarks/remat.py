"""What per-layer rematerialisation saves and costs.

    python benchmarks/remat.py [--backend torch]

A train step (IRIS, AdamW, float32) of 24 layers and 1,024 tokens, with and
without `remat_layers`, in turns. Memory is XLA's temporary memory on JAX,
with the scheduler that `remat_layers` names; elsewhere it is the peak of the
resident memory above what it was before the step, which says nothing where the
allocator keeps what earlier steps took (TensorFlow). Gradients are in it.
"""

import contextlib
import os
import statistics
import time

import harness
import models
import records

WAYS = ("plain", "remat")
MODEL = {
    "vocabulary": 2_048,
    "layers": 24,
    "width": 256,
    "heads": 4,
    "key_value_heads": 4,
    "inner_width": 768,
}
BATCH = {"pairs": 1, "length": 512, "prompt_length": 128}
QUICK_BATCH = {"pairs": 1, "length": 16, "prompt_length": 4}
XLA_FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false"


class Steps:
    """Train steps of one way.

    Args:
        way: One of `WAYS`.
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
    """

    def __init__(self, way, sizes, batch):
        os.environ["XLA_FLAGS"] = XLA_FLAGS
        import keras

        import keras_iris
        from keras_iris.models.remat import remat_layers

        causal_lm = models.keras_model(sizes)
        if way == "remat":
            remat_layers(causal_lm.backbone)
        self.model = keras_iris.SelfPlayModel(causal_lm)
        self.model.compile(
            optimizer=keras.optimizers.AdamW(1e-5),
            loss=keras_iris.losses.IRIS(),
        )
        token_ids = models.random_rows(
            batch["pairs"], batch["length"], sizes["vocabulary"]
        )
        self.data = models.pair_dataset(
            token_ids, batch["prompt_length"], batch["pairs"]
        )[0]

    def run(self):
        """Seconds of a step."""
        start = time.perf_counter()
        self.model.train_on_batch(*self.data)
        return time.perf_counter() - start

    def memory_mb(self):
        """The memory of a step in MB."""
        return models.step_memory_mb(self.model, self.data)


def main():
    """Measures a backend."""
    arguments = records.parse_arguments(
        __doc__, backend={"choices": harness.BACKENDS, "default": "jax"}
    )
    sizes, batch, rounds = MODEL, BATCH, 3
    if arguments.quick:
        sizes, batch, rounds = models.TINY, QUICK_BATCH, 1
    with contextlib.ExitStack() as stack:
        workers = {
            way: stack.enter_context(
                harness.Worker(
                    __file__,
                    "Steps",
                    backend=arguments.backend,
                    way=way,
                    sizes=sizes,
                    batch=batch,
                )
            )
            for way in WAYS
        }
        seconds = harness.take_turns(harness.runs(workers), rounds)
        memory = {way: workers[way].call("memory_mb") for way in WAYS}
    rows = [
        {
            "backend": arguments.backend,
            "way": way,
            "s/step": statistics.median(seconds[way]),
            "time ratio": harness.median_ratio(seconds[way], seconds["plain"]),
            "MB": memory[way],
            "times less": memory["plain"] / memory[way],
        }
        for way in WAYS
    ]
    bars = [
        records.bar(
            f"memory of a step, times less, {arguments.backend}",
            rows[-1]["times less"],
            at_least=3,
        )
    ]
    records.finish(
        __file__,
        arguments,
        settings={
            "model": sizes,
            "batch": batch,
            "rounds": rounds,
            "XLA_FLAGS": XLA_FLAGS,
        },
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
