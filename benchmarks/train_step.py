"""Training steps of keras_iris against TRL and a plain transformers loop.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --model smollm2  # 135M parameters, no TRL
    python benchmarks/train_step.py --model qwen2.5-0.5b  # on a GPU

Same architecture, batch, optimizer (AdamW) and precision for all: float32 on
the CPU; on a GPU mixed bfloat16, weights and moments in float32.
The objective of keras_iris and of the plain loop is IRIS; that of TRL's
`DPOTrainer` is DPO with precomputed reference log-probs. Full-length rows, so
that nobody computes padding. Every contestant has a process of its own; those
of a race take turns. They race as installed and once more with an allocator
that keeps memory between steps. With SmolLM2 a race is one of ours against the
plain loop; on a GPU, whose memory has no room for all, one comes after another.
Ratios are those within a race. A token is one of a prompt or of a
response. One row bounds those that race as installed: the kernels' products
alone, by the plain loop's library. On a GPU memory is what the libraries
allocated there, and the model FLOP utilisation (MFU) is the operations that the
result needs over what the chip's data sheet promises.
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
    "train_step_gpu": [[PLAIN, TRL, JAX, TORCH]],
}
CPU = {
    "device": "cpu",
    "batch": {"pairs": 4, "length": 256, "prompt_length": 64},
    "steps": 1,
}
GPU = {
    "device": "gpu",
    "batch": {"pairs": 4, "length": 1_024, "prompt_length": 256},
    "steps": 10,
}
MODELS = {
    "small": ("train_step", CPU | {"sizes": models.SMALL}),
    "smollm2": ("train_step_smollm2", CPU | {"sizes": models.SMOLLM2}),
    "qwen2.5-0.5b": ("train_step_gpu", GPU | {"sizes": models.QWEN}),
}
# Those that contestants compute in.
DTYPES = {"cpu": "float32", "gpu": "mixed_bfloat16"}
# FLOP/s of dense bfloat16 products on NVIDIA's H100 SXM and H200.
PEAK_FLOPS = 989e12


def main():
    """Races all contestants."""
    arguments = records.parse_arguments(
        __doc__, model={"choices": list(MODELS), "default": "small"}
    )
    name, settings = MODELS[arguments.model]
    rounds = 2
    if arguments.quick:
        settings = settings | {
            "device": "cpu",
            "batch": {"pairs": 4, "length": 32, "prompt_length": 8},
            "sizes": models.TINY,
        }
        rounds = 1
    on_gpu = name == "train_step_gpu"
    records.check_device(settings["device"])
    rows = {}
    for contestants in RACES[name]:
        race = _one_by_one if on_gpu else _race
        answers = race(contestants, rounds, **settings)
        for contestant in contestants:
            row = _row(contestant, answers, **settings)
            rows.setdefault(contestant, row)
    records.finish(
        name,
        arguments,
        settings={
            **settings,
            "dtype": DTYPES[settings["device"]],
            "optimizer": "AdamW",
            "races": RACES[name],
            "rounds": rounds,
        },
        rows=list(rows.values()),
        bars=_gpu_bars(rows) if on_gpu else _bars(rows),
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


def _one_by_one(contestants, rounds, **settings):
    """Answers by contestant; each is in memory alone."""
    answers = {}
    for name in contestants:
        answers |= _race([name], rounds, **settings)
    return answers


def _row(name, answers, *, sizes, batch, device, **_):
    def of(contestant, key):
        return [answer[key] for answer in answers[contestant]]

    plain = PLAIN + KEPT if name.endswith(KEPT) else PLAIN
    seconds, peak = of(name, "seconds"), max(of(name, "peak_mb"))
    tokens = batch["pairs"] * 2 * batch["length"]
    row = {
        "contestant": name,
        "tokens/s": tokens / statistics.median(seconds),
        "x plain loop": harness.median_ratio(of(plain, "seconds"), seconds),
        "peak MB": peak,
        "peak, x plain loop": peak / max(of(plain, "peak_mb")),
    }
    if device == "cpu":
        row["peak MB above imports"] = peak - of(name, "imported_mb")[0]
    if TRL in answers:
        row["x TRL"] = harness.median_ratio(of(TRL, "seconds"), seconds)
        row["peak, x TRL"] = peak / max(of(TRL, "peak_mb"))
    if device == "gpu":
        flops = models.step_flops(sizes, batch) / statistics.median(seconds)
        row["MFU"] = flops / PEAK_FLOPS
    return row


def _gpu_bars(rows):
    best = max((JAX, TORCH), key=lambda name: rows[name]["x TRL"])
    return [
        records.bar(
            f"tokens/s over TRL on a GPU, {best}",
            rows[best]["x TRL"],
            at_least=1.2,
        ),
        records.bar(
            f"tokens/s over TRL on a GPU, {TORCH}",
            rows[TORCH]["x TRL"],
            at_least=0.9,
        ),
    ]


def _bars(rows):
    speed = {name: row["x plain loop"] for name, row in rows.items()}
    best = max((*OURS, WITHOUT_TENSORFLOW), key=speed.get)
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
            for name in dict.fromkeys((best, WITHOUT_TENSORFLOW))
        ),
        *(
            records.bar(
                f"x plain loop over that of {XLA}, {JAX}{kept}",
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
