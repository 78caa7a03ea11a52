"""Sequence log-probs: `sequence_log_probs` against logits of all tokens.

    python benchmarks/log_probs.py [--backend jax]

Loss and gradient, by hidden states and head, of 8 responses that fill their
rows; with a frozen head, as LoRA has it, by hidden states alone. Memory is
XLA's temporary memory on JAX; elsewhere it is the peak of the resident memory
above what it was before the call, so with the head's gradient (float32, as
large as the head) on both sides. At the large size one runs after the other,
once each, in a process of its own; else they take turns. Errors are those of
single tokens against float64, at a width of 512 and logits of standard
deviation 1.
"""

import contextlib
import statistics

import harness
import log_probs_contestants as contestants
import records

WAYS = ("naive", "keras_iris")
SIZES = {
    "medium": {
        "tokens": 2_048,
        "width": 512,
        "vocabulary": 32_000,
        "dtype": "float32",
        "is_trained": True,
    },
    "large": {
        "tokens": 2_048,
        "width": 2_048,
        "vocabulary": 151_936,
        "dtype": "bfloat16",
        "is_trained": True,
    },
}
SIZES["medium, frozen head"] = SIZES["medium"] | {"is_trained": False}
QUICK = {
    name: size | {"width": 16, "vocabulary": size["vocabulary"] // 32}
    for name, size in SIZES.items()
}
# PyTorch 2.13 multiplies bfloat16 matrices at 1 GFLOP/s on processors without
# instructions for them: half an hour a gradient. So float32 there.
LARGE_DTYPES = {"torch": "float32"}
ERROR_WIDTH = 512
ERROR_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # nats


def _measure(backend, size, rounds):
    """Answers by way: of a first time and `rounds` more, both loaded.

    Without more, one is gone before the other comes.
    """
    if rounds:
        with contextlib.ExitStack() as stack:
            workers = {
                way: stack.enter_context(_worker(backend, way, size))
                for way in WAYS
            }
            return harness.take_turns(workers, "run", rounds + 1)
    answers = {}
    for way in WAYS:
        with _worker(backend, way, size) as worker:
            answers[way] = [worker.call("run")]
    return answers


def _worker(backend, way, size):
    return harness.Worker(
        contestants.__file__, "LogProbs", backend=backend, way=way, size=size
    )


def _compare(backend, name, size, rounds):
    """The table's row of a backend and a size."""
    answers = _measure(backend, size, rounds)
    row = {"size": name, "backend": backend, "dtype": size["dtype"]}
    seconds, memory = {}, {}
    for way in WAYS:
        # Libraries keep memory, so the first time counts; it compiles.
        timed = answers[way][1:] or answers[way]
        seconds[way] = [answer["seconds"] for answer in timed]
        memory[way] = answers[way][0]["memory_mb"]
        row[f"{way} s"] = statistics.median(seconds[way])
    row["time ratio"] = harness.median_ratio(
        seconds["keras_iris"], seconds["naive"]
    )
    for way in WAYS:
        row[f"{way} MB"] = memory[way]
    row["memory ratio"] = memory["keras_iris"] / memory["naive"]
    return row


def _bars(row):
    backend, ratio = row["backend"], row["memory ratio"]
    limit = 1 / 8 if backend == "jax" else round(1 / 3, 4)
    return [
        records.bar(f"memory over naive, {backend}", ratio, at_most=limit),
        records.bar(
            f"time over naive, {backend}", row["time ratio"], at_most=1.1
        ),
    ]


def _error_bars(backend, size):
    size = size | {"width": ERROR_WIDTH}
    with _worker(backend, "keras_iris", size) as worker:
        for dtype, limit in ERROR_LIMITS.items():
            error = worker.call("error", dtype=dtype)
            name = f"error in {dtype}, {backend}"
            yield records.bar(name, error, at_most=limit)


def main():
    """Compares both ways at all sizes."""
    arguments = records.parse_arguments(
        __doc__,
        backend={"choices": harness.BACKENDS, "help": "this one only"},
    )
    sizes = QUICK if arguments.quick else SIZES
    rounds = 1 if arguments.quick else 3
    rows, bars = [], []
    one = arguments.backend
    for backend in [one] if one else harness.BACKENDS:
        bars += _error_bars(backend, sizes["large"])
        for name in ("medium", "medium, frozen head"):
            rows.append(_compare(backend, name, sizes[name], rounds))
        dtype = LARGE_DTYPES.get(backend, sizes["large"]["dtype"])
        size = sizes["large"] | {"dtype": dtype}
        rows.append(_compare(backend, "large", size, 0))
        bars += _bars(rows[-1])
    records.finish(
        __file__,
        arguments,
        settings={
            **sizes,
            "rows": contestants.NUM_ROWS,
            "rounds": {"medium": rounds, "large": 1},
            "error_tokens": contestants.ERROR_TOKENS,
            "error_width": ERROR_WIDTH,
        },
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
