"""Training steps of keras_iris against TRL and a plain transformers loop.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model smollm2  # 135M parameters, no TRL

Same architecture, batch, optimizer (AdamW) and float32 for all, on the CPU.
The objective of keras_iris and of the plain loop is IRIS; that of TRL's
`DPOTrainer` is DPO with precomputed reference log-probs. Full-length rows, so
that nobody computes padding. Every contestant has a process of its own; they
take turns, all of them or, with SmolLM2, each of ours and the plain loop. A
token is one of a prompt or of a response. One row is what nobody can pass: the
kernels' products alone, by the plain loop's library.
"""

import contextlib
import functools
import statistics

import harness
import models
import records
import train_contestants

PLAIN, TRL = "transformers, plain loop", "TRL DPOTrainer"
JAX, XLA = "keras_iris, jax", "keras_iris, tensorflow XLA"
HUGE, PRODUCTS = f"{JAX}, huge pages", "matrix products alone"
# Of glibc 2.35 or newer: large blocks of memory come in pages of 2 MB.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
CONTESTANTS = {
    PLAIN: ("PlainLoop", "torch", {}),
    TRL: ("Trl", "torch", {}),
    JAX: ("KerasIris", "jax", {}),
    HUGE: ("KerasIris", "jax", {"environment": HUGE_PAGES}),
    XLA: ("KerasIris", "tensorflow", {"jit_compile": True}),
    "keras_iris, tensorflow": ("KerasIris", "tensorflow", {}),
    "keras_iris, torch": ("KerasIris", "torch", {}),
    PRODUCTS: ("Products", "torch", {}),
}
OURS = [name for name in CONTESTANTS if name.startswith("keras_iris")]


def main():
    """Races all contestants."""
    arguments = records.parse_arguments(
        __doc__,
        model={"choices": ("small", "smollm2"), "default": "small"},
    )
    batch = {"pairs": 4, "length": 256, "prompt_length": 64}
    sizes, name = models.SMALL, "train_step"
    races, rounds = [list(CONTESTANTS)], 3
    if arguments.model == "smollm2":
        # Each has 8 to 10 GB, TRL for the small model already.
        sizes, name = models.SMOLLM2, "train_step_smollm2"
        races, rounds = [[PLAIN, ours] for ours in OURS], 2
    if arguments.quick:
        batch |= {"length": 32, "prompt_length": 8}
        sizes, rounds = models.TINY, 1
    tokens = batch["pairs"] * 2 * batch["length"]
    rows = {}
    for contestants in races:
        answers = _race(contestants, rounds, sizes=sizes, batch=batch)
        for contestant in contestants:
            row = _row(contestant, answers, tokens)
            rows.setdefault(contestant, row)
    records.finish(
        name,
        arguments,
        settings={
            "model": sizes,
            "batch": batch,
            "dtype": "float32",
            "optimizer": "AdamW",
            "races": races,
            "rounds": rounds,
        },
        rows=list(rows.values()),
        bars=_bars(rows),
    )


def _race(contestants, rounds, **settings):
    """Answers by contestant; all are in memory together."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in contestants:
            contestant, backend, options = CONTESTANTS[name]
            workers[name] = stack.enter_context(
                harness.Worker(
                    train_contestants.__file__,
                    contestant,
                    backend=backend,
                    **settings,
                    **options,
                )
            )
        calls = {
            name: functools.partial(worker.call, "run")
            for name, worker in workers.items()
        }
        return harness.take_turns(calls, rounds)


def _row(name, answers, tokens):
    def of(contestant, key):
        return [answer[key] for answer in answers[contestant]]

    seconds, peak = of(name, "seconds"), max(of(name, "peak_mb"))
    row = {
        "contestant": name,
        "tokens/s": tokens / statistics.median(seconds),
        "x plain loop": harness.median_ratio(of(PLAIN, "seconds"), seconds),
        "peak MB": peak,
        "peak, x plain loop": peak / max(of(PLAIN, "peak_mb")),
        "peak MB above imports": peak - of(name, "imported_mb")[0],
    }
    if TRL in answers:
        row["x TRL"] = harness.median_ratio(of(TRL, "seconds"), seconds)
        row["peak, x TRL"] = peak / max(of(TRL, "peak_mb"))
    return row


def _bars(rows):
    speed = {name: rows[name]["x plain loop"] for name in OURS}
    name = max(speed, key=speed.get)
    best = rows[name]
    over_trl = []
    if TRL in rows:
        over_trl = [
            records.bar(
                f"tokens/s over TRL, {name}", best["x TRL"], at_least=4
            ),
            records.bar(
                f"peak memory over TRL, {name}", best["peak, x TRL"], at_most=1
            ),
        ]
    return [
        *over_trl,
        records.bar(
            f"tokens/s over the plain loop, {name}",
            best["x plain loop"],
            at_least=1.5,
        ),
        records.bar(
            f"peak memory over the plain loop, {name}",
            best["peak, x plain loop"],
            at_most=1,
        ),
        *(
            records.bar(
                f"tokens/s over {XLA}, {name}",
                speed[name] / speed[XLA],
                at_least=1,
            )
            for name in (JAX, HUGE)
        ),
        *(
            records.bar(
                f"tokens/s over the plain loop, {backend}",
                max(speed[name] for name in OURS if backend in name),
                at_least=0.9,
            )
            for backend in harness.BACKENDS
        ),
    ]


if __name__ == "__main__":
    main()
