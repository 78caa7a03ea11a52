"""Training steps of keras_iris against TRL and a plain transformers loop.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model smollm2  # 135M parameters, no TRL

Same architecture, batch, optimizer (AdamW) and float32 for all, on the CPU.
The objective of keras_iris and of the plain loop is IRIS; that of TRL's
`DPOTrainer` is DPO with precomputed reference log-probs. Full-length rows, so
that nobody computes padding. Every contestant has a process of its own; those
of a race take turns. They race as installed and once more with an allocator
that keeps memory between steps. With SmolLM2 a race is one of ours against the
plain loop. Ratios are those within a race. A token is one of a prompt or of a
response. One row bounds those that race as installed: the kernels' products
alone, by the plain loop's library.
"""

import contextlib
import statistics

import harness
import models
import records
import train_contestants

PLAIN, TRL = "transformers, plain loop", "TRL DPOTrainer"
PRODUCTS = "matrix products alone"
JAX, XLA = "keras_iris, jax", "keras_iris, tensorflow XLA"
TENSORFLOW, TORCH = "keras_iris, tensorflow", "keras_iris, torch"
WITHOUT_TENSORFLOW = f"{JAX} without TensorFlow"
OURS = [JAX, XLA, TENSORFLOW, TORCH]
CONTESTANTS = {
    PLAIN: ("PlainLoop", "torch", {}),
    TRL: ("Trl", "torch", {}),
    JAX: ("KerasIris", "jax", {}),
    XLA: ("KerasIris", "tensorflow", {"jit_compile": True}),
    TENSORFLOW: ("KerasIris", "tensorflow", {}),
    TORCH: ("KerasIris", "torch", {}),
    WITHOUT_TENSORFLOW: ("KerasIris", "jax", {"hides_tensorflow": True}),
    PRODUCTS: ("Products", "torch", {}),
}
# After the name of a contestant whose process has `harness.KEEPS_MEMORY`.
KEPT = ", kept memory"
RACES = {
    "train_step": [
        list(CONTESTANTS),
        [name + KEPT for name in (PLAIN, JAX, XLA)],
    ],
    # Each has 8 to 10 GB, TRL for the small model already.
    "train_step_smollm2": [
        *([PLAIN, name] for name in (*OURS, WITHOUT_TENSORFLOW)),
        *([PLAIN + KEPT, name + KEPT] for name in (JAX, XLA)),
    ],
}


def main():
    """Races all contestants."""
    arguments = records.parse_arguments(
        __doc__,
        model={"choices": ("small", "smollm2"), "default": "small"},
    )
    batch = {"pairs": 4, "length": 256, "prompt_length": 64}
    is_small = arguments.model == "small"
    name = "train_step" if is_small else "train_step_smollm2"
    sizes = models.SMALL if is_small else models.SMOLLM2
    rounds = 2
    if arguments.quick:
        batch |= {"length": 32, "prompt_length": 8}
        sizes, rounds = models.TINY, 1
    tokens = batch["pairs"] * 2 * batch["length"]
    rows = {}
    for contestants in RACES[name]:
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
            "races": RACES[name],
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
            contestant, backend, options = CONTESTANTS[name.removesuffix(KEPT)]
            workers[name] = stack.enter_context(
                harness.Worker(
                    train_contestants.__file__,
                    contestant,
                    backend=backend,
                    environment=(
                        harness.KEEPS_MEMORY if name.endswith(KEPT) else None
                    ),
                    **settings,
                    **options,
                )
            )
        return harness.take_turns(harness.runs(workers), rounds)


def _row(name, answers, tokens):
    def of(contestant, key):
        return [answer[key] for answer in answers[contestant]]

    plain = PLAIN + KEPT if name.endswith(KEPT) else PLAIN
    seconds, peak = of(name, "seconds"), max(of(name, "peak_mb"))
    row = {
        "contestant": name,
        "tokens/s": tokens / statistics.median(seconds),
        "x plain loop": harness.median_ratio(of(plain, "seconds"), seconds),
        "peak MB": peak,
        "peak, x plain loop": peak / max(of(plain, "peak_mb")),
        "peak MB above imports": peak - of(name, "imported_mb")[0],
    }
    if TRL in answers:
        row["x TRL"] = harness.median_ratio(of(TRL, "seconds"), seconds)
        row["peak, x TRL"] = peak / max(of(TRL, "peak_mb"))
    return row


def _bars(rows):
    speed = {name: row["x plain loop"] for name, row in rows.items()}
    best = max(OURS, key=speed.get)
    over_trl = []
    if TRL in rows:
        over_trl = [
            records.bar(
                f"tokens/s over TRL, {best}", rows[best]["x TRL"], at_least=4
            ),
            records.bar(
                f"peak memory over TRL, {best}",
                rows[best]["peak, x TRL"],
                at_most=1,
            ),
        ]
    return [
        *over_trl,
        records.bar(
            f"tokens/s over the plain loop, {best}", speed[best], at_least=1.5
        ),
        *(
            records.bar(
                f"peak memory over the plain loop, {name}",
                rows[name]["peak, x plain loop"],
                at_most=1,
            )
            for name in (best, WITHOUT_TENSORFLOW)
        ),
        *(
            records.bar(
                f"tokens/s over {XLA}, {JAX}{kept}",
                speed[JAX + kept] / speed[XLA + kept],
                at_least=1,
            )
            for kept in ("", KEPT)
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
