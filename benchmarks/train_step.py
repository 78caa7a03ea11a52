"""Training steps of keras_iris against TRL and a plain transformers loop.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model smollm2  # 135M parameters, no TRL

Same architecture, batch, optimizer (AdamW) and float32 for all, on the CPU.
The objective of keras_iris and of the plain loop is IRIS; that of TRL's
`DPOTrainer` is DPO with precomputed reference log-probs. Full-length rows, so
that nobody computes padding. Every contestant has a process of its own; they
take turns, TRL with the plain loop alone, those of SmolLM2 in pairs. A token
is one of a prompt or of a response. One row is what nobody can pass: the
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
PRODUCTS = "matrix products alone"
CONTESTANTS = {
    PLAIN: ("PlainLoop", "torch", {}),
    TRL: ("Trl", "torch", {}),
    JAX: ("KerasIris", "jax", {}),
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
    races = [([PLAIN, *OURS, PRODUCTS], 4), ([PLAIN, TRL], 1)]
    if arguments.model == "smollm2":
        # Each has 8 to 10 GB, TRL for the small model already.
        sizes, name = models.SMOLLM2, "train_step_smollm2"
        races = [([PLAIN, ours], 2) for ours in OURS] + [([JAX, XLA], 2)]
    if arguments.quick:
        batch |= {"length": 32, "prompt_length": 8}
        sizes, races = models.TINY, [(names, 1) for names, _ in races]
    tokens = batch["pairs"] * 2 * batch["length"]
    rows, jax_over_xla = {}, None
    for contestants, rounds in races:
        answers = _race(contestants, rounds, sizes=sizes, batch=batch)
        if {JAX, XLA} <= set(contestants):
            jax_over_xla = _speed(answers, JAX, XLA)
        if PLAIN in contestants:
            for contestant in contestants:
                row = _row(contestant, answers, tokens)
                rows.setdefault(contestant, row)
    if TRL in rows:
        for row in rows.values():
            for key in ("x plain loop", "peak, x plain loop"):
                peer = key.replace("plain loop", "TRL")
                row[peer] = row[key] / rows[TRL][key]
    records.finish(
        name,
        arguments,
        settings={
            "model": sizes,
            "batch": batch,
            "dtype": "float32",
            "optimizer": "AdamW",
            "races": races,
        },
        rows=list(rows.values()),
        bars=_bars(rows, jax_over_xla),
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


def _speed(answers, name, other):
    """How many times as fast a contestant is as another."""
    return harness.median_ratio(
        _values(answers, other, "seconds"), _values(answers, name, "seconds")
    )


def _values(answers, name, key):
    return [answer[key] for answer in answers[name]]


def _row(name, answers, tokens):
    peak = max(_values(answers, name, "peak_mb"))
    seconds = statistics.median(_values(answers, name, "seconds"))
    return {
        "contestant": name,
        "tokens/s": tokens / seconds,
        "x plain loop": _speed(answers, name, PLAIN),
        "peak MB": peak,
        "peak, x plain loop": peak / max(_values(answers, PLAIN, "peak_mb")),
        "peak MB above imports": (
            peak - _values(answers, name, "imported_mb")[0]
        ),
    }


def _bars(rows, jax_over_xla):
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
        records.bar(
            "tokens/s, jax over tensorflow with XLA",
            jax_over_xla,
            at_least=1,
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
