"""Generation by `KerasEngine` against `transformers.generate`.

    python benchmarks/generation.py

Same weights, read from one folder that `keras_iris.export` wrote, same
prompts (log-normal lengths of mean 180), sampling at temperature 1, up to 128
new tokens, batches of 32, float32. Random weights never choose one end token
of 32,000; so 1/64 of the ids end an answer, which makes lengths as uneven as
natural stops do. Useful tokens are those of the answers, the end token
included; prompts and what is computed after an end don't count.
`transformers` gets its prompts in the order given, and in a second run sorted
by length; its batches wait for their longest answers. Decode steps don't depend
on the size of a model: a tiny one counts them, over more prompts and with an
end token in 4, so that whole batches stop early.
"""

import contextlib
import functools
import os
import statistics
import tempfile

import generation_contestants as contestants
import harness
import models
import numpy as np
import records

PLAIN, SORTED = "transformers.generate", "transformers.generate, sorted"
SETTINGS = {
    "model": models.SMALL,
    "prompts": 192,
    "mean_prompt_length": 180,
    "max_new_tokens": 128,
    "batch_size": contestants.BATCH_SIZE,
    "rounds": 1,
    "prompts_of_step_counts": (64, 512),
}
QUICK = SETTINGS | {
    "model": models.TINY,
    "prompts": 33,
    "mean_prompt_length": 12,
    "max_new_tokens": 8,
    "rounds": 1,
    "prompts_of_step_counts": (33, 64),
}


def _race(settings, folder):
    """Answers by contestant, one a round."""
    sizes = settings["model"]
    start = functools.partial(
        harness.Worker, contestants.__file__, folder=folder
    )
    with start("Exporter", backend="jax", sizes=sizes) as exporter:
        exporter.wait()
    prompts = contestants.random_prompts(
        settings["prompts"],
        settings["mean_prompt_length"],
        sizes["vocabulary"],
    )
    start = functools.partial(
        start,
        vocabulary=sizes["vocabulary"],
        max_new_tokens=settings["max_new_tokens"],
    )
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(start("Transformers"))
        calls = {
            PLAIN: peer.call,
            SORTED: functools.partial(peer.call, is_sorted=True),
        }
        for backend in harness.BACKENDS:
            worker = stack.enter_context(start("Keras", backend=backend))
            calls[f"keras_iris, {backend}"] = worker.call
        answers = {name: [] for name in calls}
        for name, call in calls.items():
            # PyTorch compiles nothing.
            is_compiled = name.endswith(("jax", "tensorflow"))
            first = prompts if is_compiled else prompts[:2]
            call("run", prompts=first, seed=0)
        for seed in range(settings["rounds"]):
            for name in list(calls)[:: -1 if seed % 2 else 1]:
                answer = calls[name]("run", prompts=prompts, seed=seed)
                answers[name].append(answer)
    return answers


def _count(settings):
    """Decode steps of a tiny model, and compiled lengths."""
    with harness.Worker(
        contestants.__file__,
        "Counter",
        backend="jax",
        max_new_tokens=settings["max_new_tokens"],
    ) as worker:
        mean_length = settings["mean_prompt_length"]
        steps = [
            worker.call("count_steps", number=number, mean_length=mean_length)
            for number in settings["prompts_of_step_counts"]
        ]
        lengths = worker.call(
            "compiled_lengths", number=10_000, mean_length=mean_length
        )
    return {"steps": steps, "compiled_lengths": lengths}


def _row(name, answers):
    def seconds(contestant):
        return [a["seconds_per_token"] for a in answers[contestant]]

    return {
        "contestant": name,
        "useful tokens/s": 1 / statistics.median(seconds(name)),
        "x transformers": harness.median_ratio(seconds(PLAIN), seconds(name)),
        "x sorted": harness.median_ratio(seconds(SORTED), seconds(name)),
        "mean length": float(
            np.mean([a["mean_length"] for a in answers[name]])
        ),
        "peak MB": max(a["peak_mb"] for a in answers[name]),
    }


def _bars(rows, counts):
    return [
        *(
            records.bar(
                f"useful tokens/s over {peer}, {row['contestant']}",
                row[key],
                at_least=1.5,
            )
            for row in rows
            if row["contestant"].endswith(("jax", "tensorflow"))
            for peer, key in ((PLAIN, "x transformers"), (SORTED, "x sorted"))
        ),
        *(
            records.bar(
                f"decode steps over {name}, {steps['prompts']} prompts",
                steps["made"] / steps[key],
                at_most=limit,
            )
            for steps in counts["steps"]
            for name, key, limit in (
                ("the fewest without idle rows", "fewest", 1.5),
                ("those of waiting batches", "waiting", 1.0),
            )
        ),
        records.bar(
            "compiled shapes for 10,000 prompts",
            len(counts["compiled_lengths"]),
            at_most=8,
        ),
    ]


def main():
    """Measures all contestants."""
    arguments = records.parse_arguments(__doc__)
    settings = QUICK if arguments.quick else SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        answers = _race(settings, os.path.join(folder, "model"))
    counts = _count(settings)
    rows = [_row(name, answers) for name in answers]
    records.finish(
        __file__,
        arguments,
        settings=settings,
        rows=rows,
        bars=_bars(rows, counts),
        counts=counts,
    )


if __name__ == "__main__":
    main()
