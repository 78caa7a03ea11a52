"""Self-play against SFT, in equal steps, on SmolLM2-135M-Instruct.

    python tests/make_smollm2.py
    python benchmarks/smollm2_study.py --small
    python benchmarks/smollm2_study.py

What people wrote each other (`chitchat-dataset`, needs the extra `dev`) is
what the model learns, by LoRA, from the same start in as many steps: with IRIS
of the adaptive order, with SPIN, with T-SPIN, and with SFT, the control of the
first. The learning rate is the same for all and wasn't searched. Held-out
messages are answered at temperature 1.

- `nll_per_token`: of annotated answers, nats.
- `length`: tokens of an answer, with its end.
- `repeated_3`: share of its 3-grams of tokens that it has already had.
- `distinct_1`, `distinct_2`: distinct n-grams of all answers, over all. They
  fall with the length of answers.
- `told_apart`: how often a classifier knows an answer from the annotated one
  (0.5: it can't).

Intervals are of 95%, a bootstrap over held-out examples; differences are
paired. One seed of training: it says nothing about others. Runs are kept, each
with its report, and taken up again if they were cut off. The whole size, hours
on two cores, isn't measured.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # what was measured
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import records
from smollm2_scores import NLL, SCORE_MODES, TOLD_APART, AnswerScores, load_rows

import keras_iris
from keras_iris.evaluation.run_record import read_run
from keras_iris.losses import IRIS, SPIN, TSPIN
from keras_iris.metrics import ExampleScore, interval_of_difference

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "methods": ["IRIS", "SPIN", "T-SPIN"],
    "prompts": 1024,
    "held_out": 256,
    "iterations": 3,
    "epochs": 1,
    "batch_size": 16,
    "score_batch_size": 16,
    "learning_rate": 3e-4,
    "lora_rank": 16,
    "max_prompt_length": 48,
    "max_response_length": 64,
    "folds": 8,
}
SMALL = SETTINGS | {
    "prompts": 192,
    "held_out": 96,
    "iterations": 2,
    "learning_rate": 1e-3,
    "max_response_length": 24,
}
QUICK = SETTINGS | {
    "methods": ["IRIS"],
    "prompts": 8,
    "held_out": 8,
    "iterations": 1,
    "batch_size": 4,
    "max_prompt_length": 96,
    "folds": 2,
}
LOSSES = {"IRIS": IRIS, "SPIN": SPIN, "T-SPIN": TSPIN}
# The run that has the control.
WITH_CONTROL = "IRIS"
SCORES = (NLL, "length", "repeated_3", "distinct_1", "distinct_2", TOLD_APART)


def load_examples(causal_lm, settings):
    """Training and held-out examples."""
    examples = keras_iris.data.tokenize(
        keras_iris.data.read_conversations(load_rows()),
        causal_lm.tokenizer,
        template=causal_lm.chat_template,
        max_prompt_length=settings["max_prompt_length"],
        max_response_length=settings["max_response_length"],
    )
    first, number = settings["held_out"], settings["prompts"]
    return examples[first : first + number], examples[:first]


def play(name, settings, arguments, known):
    """Trains and scores a method, and the control if it is its turn.

    Returns:
        The run's folder, and the scores of the annotated answers.
    """
    keras.utils.set_random_seed(0)
    causal_lm = keras_iris.load(
        arguments.preset, lora_rank=settings["lora_rank"]
    )
    train, held_out = load_examples(causal_lm, settings)
    model = keras_iris.SelfPlayModel(causal_lm)
    rate = keras.optimizers.schedules.CosineDecay(
        settings["learning_rate"], count_steps(settings)
    )
    model.compile(optimizer=keras.optimizers.AdamW(rate), loss=LOSSES[name]())
    engine = keras_iris.generation.KerasEngine(
        causal_lm,
        end_token_ids=causal_lm.tokenizer.end_token_ids,
        max_new_tokens=settings["max_response_length"],
        bucket_lengths=(settings["max_prompt_length"],),
    )
    evaluate = AnswerScores(
        engine, causal_lm.tokenizer, held_out, settings, known
    )
    folder = arguments.run_dir / name.lower()
    keras_iris.SelfPlay(
        model,
        train,
        folder,
        iterations=settings["iterations"],
        epochs=settings["epochs"],
        batch_size=settings["batch_size"],
        max_response_length=settings["max_response_length"],
        engine=engine,
        evaluate=evaluate,
        score_modes=SCORE_MODES,
        control="sft" if name == WITH_CONTROL else None,
        callbacks=[keras_iris.callbacks.AlphaScheduler()]
        if name == "IRIS"
        else [],
        title=f"{name} on SmolLM2-135M-Instruct",
    ).run()
    keras_iris.evaluation.report(folder)
    return folder, evaluate.annotated()


def count_steps(settings):
    """Steps of each method."""
    steps = -(-settings["prompts"] // settings["batch_size"])
    return settings["iterations"] * settings["epochs"] * steps


def read_arms(folders):
    """The scores of start, SFT and the methods, by name, from their runs.

    Returns:
        Those at the end of each, the number of its steps, and the seconds of
        all runs.
    """
    with_control = read_run(folders[WITH_CONTROL])
    (sft,) = with_control.others
    runs = {"start": with_control, "SFT": sft}
    runs |= {name: read_run(folder) for name, folder in folders.items()}
    arms, steps, seconds = {}, {}, 0.0
    for name, run in runs.items():
        reached = run.scores("step")
        last = 0 if name == "start" else max(reached)
        arms[name] = {score: run.examples(score, last) for score in SCORES}
        steps[name] = reached[last]
        if name != "start":
            parts = [*run.of_kind("iteration"), *run.of_kind("evaluation")]
            seconds += sum(
                value
                for line in parts
                for key, value in line.items()
                if key.endswith("seconds")
            )
    return arms, steps, round(seconds)


def make_figures(arms, annotated):
    """Each score with its interval, and differences from start and SFT.

    Returns:
        Dictionaries with `arm`, `score`, `value`, `low` and `high`.
    """
    figures = [
        figure(arm, score, each[score])
        for arm, each in {"annotated": annotated, **arms}.items()
        for score in each
    ]
    return figures + [
        figure(f"{arm} - {base}", score, arms[arm][score], arms[base][score])
        for base in ("start", "SFT")
        for arm in arms
        if arm not in ("start", base)
        for score in SCORES
    ]


def figure(arm, score, ours, theirs=None):
    """A score, or a difference of two, with the ends of its interval."""
    if theirs is None:
        theirs = ExampleScore(np.zeros(len(ours.values)), ours.weights)
    low, high = interval_of_difference(ours, theirs)
    values = {"value": ours - theirs, "low": low, "high": high}
    return {"arm": arm, "score": score} | {
        name: float(f"{value:.4g}") for name, value in values.items()
    }


def make_rows(figures):
    """Rows of a table: an arm, and a text for each score."""
    rows = {}
    for each in figures:
        row = rows.setdefault(
            each["arm"], {"arm": each["arm"], **dict.fromkeys(SCORES, "")}
        )
        row[each["score"]] = "{value:.3g} ({low:.3g} to {high:.3g})".format(
            **each
        )
    return list(rows.values())


def main():
    """Trains, scores and compares."""
    arguments = records.parse_arguments(
        __doc__,
        small={"action": "store_true", "help": "what was measured"},
        preset={
            "default": str(ROOT / ".smollm2" / "SmolLM2-135M-Instruct"),
            "help": "folder or name of the model",
        },
        runs={"type": Path, "default": ROOT / "runs", "help": "their folder"},
    )
    settings = SMALL if arguments.small else SETTINGS
    settings = QUICK if arguments.quick else settings
    size = "small" if arguments.small else "whole"
    arguments.run_dir = arguments.runs / f"smollm2_study_{size}"
    known, folders = {}, {}
    for name in settings["methods"]:
        print(name, flush=True)
        folders[name], annotated = play(name, settings, arguments, known)
    arms, steps, seconds = read_arms(folders)
    figures = make_figures(arms, annotated)
    on_cpu = "cpu" in keras_iris.backend.device_names()[-1].lower()
    apart = max(abs(steps[name] - steps["SFT"]) for name in folders)
    records.finish(
        __file__,
        arguments,
        settings=settings
        | {
            "device": "cpu" if on_cpu else "gpu",
            "backend": keras.backend.backend(),
            "steps": steps["SFT"],
        },
        rows=make_rows(figures),
        bars=[records.bar("steps apart from SFT's, largest", apart, at_most=0)],
        figures=figures,
        # Of the runs: this process may have taken them up, or only read them.
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
