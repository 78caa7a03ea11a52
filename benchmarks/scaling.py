"""How the cost of a training step grows, and which term dominates it.

    python benchmarks/scaling.py

Time and memory of a step of keras_iris (IRIS, AdamW, float32) against batch,
length, vocabulary and layers, one changed at a time. An exponent is the slope
of the line through the logarithms: 1 where the cost is proportional. The time
is then fitted as a sum of terms, none negative: a constant, the head
(tokens x width x vocabulary), the layers' matrices (tokens x their
parameters), attention (tokens x length x width x layers), and the optimizer
(all parameters). Memory is XLA's temporary memory on JAX, elsewhere the peak
of the resident memory above what it was before the step, in processes of their
own whose libraries give memory back at once (TensorFlow without oneDNN).
"""

import contextlib
import statistics
import time

import harness
import models
import numpy as np
import records
from scipy.optimize import nnls

BASE = {"batch": 2, "length": 128, "vocabulary": 8_192, "layers": 1}
QUICK_BASE = {"batch": 2, "length": 16, "vocabulary": 256, "layers": 1}
FACTORS = (1, 2, 4)
WIDTH, INNER_WIDTH = 256, 768
TERMS = ("constant", "head", "layers", "attention", "optimizer")


class Steps:
    """Train steps of a model at many sizes, one after another."""

    def measure(self, size, repeats):
        """Median seconds and memory (MB) of a step at a size."""
        import keras

        model, data = self._make(size)
        model.train_on_batch(*data)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            model.train_on_batch(*data)
            seconds.append(time.perf_counter() - start)
        memory_mb = models.step_memory_mb(model, data)
        keras.backend.clear_session()
        return {"seconds": statistics.median(seconds), "mb": memory_mb}

    def _make(self, size):
        import keras

        import keras_iris

        sizes = {
            "vocabulary": size["vocabulary"],
            "layers": size["layers"],
            "width": WIDTH,
            "heads": 4,
            "key_value_heads": 4,
            "inner_width": INNER_WIDTH,
        }
        model = keras_iris.SelfPlayModel(models.keras_model(sizes))
        model.compile(
            optimizer=keras.optimizers.AdamW(1e-5),
            loss=keras_iris.losses.IRIS(),
        )
        token_ids = models.random_rows(
            size["batch"], size["length"], size["vocabulary"]
        )
        prompt_length = size["length"] // 4
        dataset = models.pair_dataset(token_ids, prompt_length, size["batch"])
        return model, dataset[0]


def list_sizes(base, factors):
    """The base, then one dimension changed at a time."""
    sizes = [("base", 1, base)]
    for name, value in base.items():
        for factor in factors[1:]:
            sizes.append((name, factor, base | {name: value * factor}))
    return sizes


def exponents(sizes, values):
    """Log-log slopes by dimension; `values` belong to `sizes`."""
    slopes = {}
    for name in sizes[0][2]:
        points = [
            (np.log(factor), np.log(max(value, 1e-9)))
            for (changed, factor, _), value in zip(sizes, values, strict=True)
            if changed in ("base", name)
        ]
        slopes[name] = float(np.polyfit(*zip(*points, strict=True), 1)[0])
    return slopes


def shares(sizes, seconds):
    """Fits the terms of the time; gives their shares at each size.

    Args:
        sizes: What `list_sizes` gave.
        seconds: A time for each.

    Returns:
        Shares by term at each size, and the median relative error of the fit.
    """
    terms = np.array([_terms(size) for _, _, size in sizes])
    seconds = np.asarray(seconds)
    # Relative errors count, and terms of one magnitude are fitted better.
    scale = terms.max(axis=0)
    weighted = terms / scale / seconds[:, None]
    factors, _ = nnls(weighted, np.ones(len(seconds)))
    parts = terms / scale * factors  # (sizes, terms)
    fitted = parts.sum(axis=1)
    error = float(np.median(np.abs(fitted / seconds - 1)))
    return [
        dict(zip(TERMS, map(float, row), strict=True))
        for row in parts / fitted[:, None]
    ], error


def _terms(size):
    tokens = 2 * size["batch"] * size["length"]
    # Four matrices of attention, three of the feed-forward network.
    layers = size["layers"] * (4 * WIDTH**2 + 3 * WIDTH * INNER_WIDTH)
    head = WIDTH * size["vocabulary"]
    attention = tokens * size["length"] * WIDTH * size["layers"]
    # Three of four tokens are of the response and pass through the head.
    return 1, 0.75 * tokens * head, tokens * layers, attention, layers + head


def main():
    """Measures all backends."""
    arguments = records.parse_arguments(__doc__)
    base, factors, repeats = BASE, FACTORS, 3
    if arguments.quick:
        base, factors, repeats = QUICK_BASE, FACTORS[:2], 1
    sizes = list_sizes(base, factors)
    rows, points = [], {}
    with contextlib.ExitStack() as stack:

        def start(backend, **options):
            return stack.enter_context(
                harness.Worker(__file__, "Steps", backend=backend, **options)
            )

        workers = {backend: start(backend) for backend in harness.BACKENDS}
        lean = {
            backend: start(backend, environment=harness.RETURNS_MEMORY)
            for backend in workers
            if backend != "jax"
        }
        for worker in (*workers.values(), *lean.values()):
            worker.wait()
        answers = {backend: [] for backend in workers}
        for _, _, size in sizes:
            for backend, worker in workers.items():
                answer = worker.call("measure", size=size, repeats=repeats)
                if backend in lean:
                    other = lean[backend].call("measure", size=size, repeats=1)
                    answer["mb"] = other["mb"]
                answers[backend].append(answer)
    for backend, measured in answers.items():
        seconds = [answer["seconds"] for answer in measured]
        memory = [answer["mb"] for answer in measured]
        by_size, error = shares(sizes, seconds)
        rows += _rows(backend, sizes, seconds, memory, by_size)
        points[backend] = {
            "points": [
                {"changed": name, "factor": factor, **answer}
                for (name, factor, _), answer in zip(
                    sizes, measured, strict=True
                )
            ],
            "shares_at_base": by_size[0],
            "median_relative_error_of_fit": error,
        }
    records.finish(
        __file__,
        arguments,
        settings={
            "base": base,
            "factors": factors,
            "width": WIDTH,
            "inner_width": INNER_WIDTH,
            "repeats": repeats,
        },
        rows=rows,
        bars=[],
        measured=points,
    )


def _rows(backend, sizes, seconds, memory, by_size):  # noqa: PLR0913
    """A row for each dimension."""
    time_slopes = exponents(sizes, seconds)
    memory_slopes = exponents(sizes, memory)
    rows = []
    for name in sizes[0][2]:
        last = max(i for i, size in enumerate(sizes) if size[0] == name)
        term = max(by_size[last], key=by_size[last].get)
        rows.append(
            {
                "backend": backend,
                "against": name,
                "time exponent": time_slopes[name],
                "memory exponent": memory_slopes[name],
                "base s": seconds[0],
                "largest s": seconds[last],
                "base MB": memory[0],
                "largest MB": memory[last],
                "dominating term at the largest": term,
                "its share": by_size[last][term],
            }
        )
    return rows


if __name__ == "__main__":
    main()
