"""What tests of reports share: the files of a run."""

import json
from pathlib import Path

from safetensors.numpy import save_file

from keras_iris.evaluation.run_record import RunRecord
from keras_iris.metrics import ExampleScore

STEPS = 4  # of an iteration
# By iteration: 0 is before self-play.
NLL = {"run": [0.50, 0.45, 0.40], "control": [0.50, 0.46, 0.44]}
ACCURACY = {"run": [0.30, 0.31, 0.32], "control": [0.30, 0.32, 0.36]}


def evaluation(iteration, **scores):
    step = iteration * STEPS
    place = {"kind": "evaluation", "iteration": iteration, "step": step}
    return {**place, "seconds": 1.5, **scores}


def step_line(iteration, step):
    return {
        "kind": "step",
        "iteration": iteration,
        "step": step,
        "seconds": 0.1,
        "loss": -0.1 * step,
        "alpha": 2.0 - 0.1 * step,
        "gap": 0.8 / iteration,
        "margin": 0.5 * step,
        "margin_accuracy": 0.75,
        "real_ess": 0.9,
        "synthetic_ess": 1.0 / step,
        "real_log_ratio": 0.2 * step,
        "synthetic_log_ratio": -0.3 * step,
        "real_nll": 0.5,
        "synthetic_nll": 0.2,
    }


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def score_line(run, iteration):
    return evaluation(
        iteration,
        nll_per_token=NLL[run][iteration],
        word_accuracy=ACCURACY[run][iteration],
    )


def record(*lines, name="this run", others=(), **manifest):
    manifest = {"execution": {}, **manifest}
    return RunRecord(name, list(lines), manifest, Path("none"), others)


def keep_examples(folder, iteration, **scores):
    """What `SelfPlay` keeps of scores that remember their examples."""
    arrays = {
        f"{name}.{part}": getattr(score, part)
        for name, values in scores.items()
        for score in [
            values if isinstance(values, ExampleScore) else ExampleScore(values)
        ]
        for part in ("values", "weights")
    }
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    file = f"evaluations/iteration_{iteration:03d}.safetensors"
    save_file(arrays, folder / file)


def write_answers(folder, **texts):
    folder.mkdir(exist_ok=True)
    lines = [
        {"iteration": i, "number": 0, "prompt": "p <b>", "annotated": "a"}
        | {"answer": text}
        for i, text in enumerate(texts.values())
    ]
    others = [{**lines[0], "iteration": 2, "answer": 5}, {"number": "0"}, 7]
    lines = [*map(json.dumps, [*lines, *others]), '{"iteration": 7, "num']
    text = "\n".join(lines).encode() + b"\xff\n" + 100_000 * b"["
    (folder / "answers.jsonl").write_bytes(text)
