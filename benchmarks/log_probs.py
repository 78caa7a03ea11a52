"""Sequence log-probs: `sequence_log_probs` against logits of all tokens.

    python benchmarks/log_probs.py [--backend jax]
    python benchmarks/log_probs.py --device gpu  # JAX and PyTorch

Loss and gradient, by hidden states and head, of 8 responses that fill their
rows; with a frozen head, as LoRA has it, by hidden states alone. Memory is
XLA's temporary memory on JAX; elsewhere it is the peak of the resident memory
above what it was before the call, so with the head's gradient (float32, as
large as the head) on both sides. Each has a process of its own; they take
turns, at the large size once: in the second call, on PyTorch in the first.
Errors are those of single tokens against float64, at a width of 512 and logits
of standard deviation 1. On a GPU memory is what the library allocates there,
and all calls are repeated.
"""

import contextlib
import statistics

import harness
import log_probs_contestants as contestants
import records

WAYS = ("naive", "keras_iris")
SIZES = {
    "frozen head": {
        "tokens": 2_048,
        "width": 512,
        "vocabulary": 32_000,
        "dtype": "float32",
        "is_trained": False,
    },
    "large": {
        "tokens": 2_048,
        "width": 2_048,
        "vocabulary": 151_936,
        "dtype": "bfloat16",
        "is_trained": True,
    },
}
QUICK = {
    name: size | {"width": 16, "vocabulary": size["vocabulary"] // 32}
    for name, size in SIZES.items()
}
# PyTorch 2.13 multiplies bfloat16 matrices at 1 GFLOP/s on processors without
# instructions for them: half an hour a gradient. So float32 there.
LARGE_DTYPES = {"torch": "float32"}
ERROR_WIDTH = 512
ERROR_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # nats


def _compare(backend, device, sizes, rounds):
    """The table's rows of a backend, and its bars."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: {
                way: stack.enter_context(_worker(backend, device, way, size))
                for way in WAYS
            }
            for name, size in sizes.items()
        }
        calls = {name: harness.runs(pair) for name, pair in workers.items()}
        rows = [
            {"size": name, "backend": backend, "dtype": size["dtype"]}
            | _measure(
                calls[name],
                0 if (name, device) == ("large", "cpu") else rounds,
                # Half a minute of PyTorch's products needs no call before.
                is_first_timed=(name, backend, device)
                == ("large", "torch", "cpu"),
            )
            for name, size in sizes.items()
        ]
        last = workers["large"]["keras_iris"]
        bars = [
            records.bar(
                f"error in {dtype}, {backend}",
                last.call("error", dtype=dtype, width=ERROR_WIDTH),
                at_most=limit,
            )
            for dtype, limit in ERROR_LIMITS.items()
        ]
    return rows, bars + _bars(rows[-1])


def _worker(backend, device, way, size):
    return harness.Worker(
        contestants.__file__,
        "LogProbs",
        backend=backend,
        device=device,
        way=way,
        size=size,
    )


def _measure(calls, rounds, is_first_timed):
    """Seconds and memory by way, and their ratios.

    Libraries keep memory, so that of the first call counts.
    """
    memory, seconds = {}, {}
    for way, call in calls.items():
        first = call()
        memory[way] = first["memory_mb"]
        seconds[way] = [(first if is_first_timed else call())["seconds"]]
    for way, answers in harness.take_turns(calls, rounds).items():
        seconds[way] += [answer["seconds"] for answer in answers]
    return {
        **{f"{way} s": statistics.median(seconds[way]) for way in WAYS},
        "time ratio": harness.median_ratio(
            seconds["keras_iris"], seconds["naive"]
        ),
        **{f"{way} MB": memory[way] for way in WAYS},
        "memory ratio": memory["keras_iris"] / memory["naive"],
    }


def _bars(row):
    name = f"over naive, {row['backend']} in {row['dtype']}"
    limit = 1 / 8 if row["backend"] == "jax" else round(1 / 3, 4)
    return [
        records.bar(f"memory {name}", row["memory ratio"], at_most=limit),
        records.bar(f"time {name}", row["time ratio"], at_most=1.1),
    ]


def main():
    """Compares both ways at all sizes."""
    arguments = records.parse_arguments(
        __doc__,
        backend={"choices": harness.BACKENDS, "help": "this one only"},
        device={"choices": ("cpu", "gpu"), "default": "cpu"},
    )
    device = arguments.device
    records.check_device(device)
    backends = harness.BACKENDS if device == "cpu" else harness.GPU_BACKENDS
    sizes = QUICK if arguments.quick else SIZES
    rounds = 0 if arguments.quick else 2
    rows, bars = [], []
    one = arguments.backend
    for backend in [one] if one else backends:
        large = sizes["large"]
        if device == "cpu" and backend in LARGE_DTYPES:
            large = large | {"dtype": LARGE_DTYPES[backend]}
        found = _compare(backend, device, sizes | {"large": large}, rounds)
        rows += found[0]
        bars += found[1]
    records.finish(
        "log_probs" if device == "cpu" else "log_probs_gpu",
        arguments,
        settings={
            "device": device,
            **sizes,
            "rows": contestants.NUM_ROWS,
            "rounds": {
                "frozen head": rounds + 1,
                "large": 1 if device == "cpu" else rounds + 1,
            },
            "error_tokens": contestants.ERROR_TOKENS,
            "error_width": ERROR_WIDTH,
        },
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
