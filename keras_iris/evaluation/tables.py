"""What a report says: tables, and a few sentences."""

import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_iris.evaluation.run_record import Line, RunRecord
from keras_iris.metrics import interval_of_difference

_TRAINING = "alpha gap margin margin_accuracy real_ess synthetic_ess"
_TRAINING += " real_nll synthetic_nll"
_TIMING = "generate_seconds score_seconds fit_seconds tokens_per_second"
_TIMING += " evaluate_seconds"


class Table(NamedTuple):
    """A table of text: its first columns are labels, the others numbers."""

    title: str
    note: str
    num_labels: int
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """The table in plain text, labels on the left, numbers right."""
        cells = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sides = "<" * self.num_labels + ">" * len(widths)
        lines = [
            "  ".join(map("{:{}{}}".format, row, sides, widths)).rstrip()
            for row in cells
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([self.title, *lines, self.note])


def format_number(value: float, sign: str = "") -> str:
    """A number with four decimals where that makes sense."""
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:{sign}.1e}"
    decimals = 4 if size < 10 else 2 if size < 1000 else 0
    return f"{value:{sign},.{decimals}f}"


def make_tables(run: RunRecord, others: Sequence[RunRecord]) -> list[Table]:
    """The tables for which the run has numbers, that of scores first."""
    evaluations = [
        {"iteration": i, "evaluate_seconds": seconds}
        for i, seconds in run.scores("seconds").items()
    ]
    timing = [*run.of_kind("iteration"), *evaluations]
    tables = [
        _scores(run, others),
        Table(
            "Training, mean over the steps of an iteration",
            "gap and margin in nats, NLL in nats per token; ESS: effective "
            "sample size as a share of the batch. real: annotated.",
            1,
            *_means(run.of_kind("step"), _TRAINING, format_number),
        ),
        Table(
            "Timing",
            "Of an iteration that was cut off and resumed, the time after "
            "that. Response tokens per second of fitting.",
            1,
            *_means(timing, _TIMING, "{:,.1f}".format),
        ),
    ]
    return [table for table in tables if table.rows]


def _scores(run: RunRecord, others: Sequence[RunRecord]) -> Table:
    iterations = sorted(run.scores("step"))
    rows = []
    for score in run.score_names():
        for other in (run, *others):
            values = other.scores(score)
            label = run.label(score) if other is run else ""
            cells = [
                format_number(values[i]) if i in values else "-"
                for i in iterations
            ]
            outcome = compare(run, other, score)
            rows.append([label, other.name, *outcome, *cells])
    header = ["score", "run", f"{run.name} ended", "difference", "95% interval"]
    return Table(
        "Held-out scores",
        "By iteration; 0 is before self-play, the start. difference: "
        f"{run.name} minus the run of the line, or its own start, at the last "
        "iteration of both; its interval is over the held-out examples, not "
        "over seeds of training. No verdict: the examples' scores weren't "
        "kept or are of others, or which way is better isn't known.",
        3,
        [*header, *map(str, iterations)],
        rows,
    )


def compare(run: RunRecord, other: RunRecord, score: str) -> list[str]:
    """How a run ended, and the difference; to itself: to its start."""
    ours, theirs = run.scores(score), other.scores(score)
    if other is run:
        theirs = {i: ours[0] for i in ours if 0 in ours}
    last = max(ours.keys() & theirs.keys(), default=0)
    if last == 0:
        return ["-", "-", "-"]
    difference = ours[last] - theirs[last]
    if not math.isfinite(difference):
        return ["not comparable", "-", "-"]
    examples = run.examples(score, last)
    others = other.examples(score, 0 if other is run else last)
    ends = None
    if examples and others:
        # Of the same examples, and not only of as many.
        if np.array_equal(examples.weights, others.weights):
            ends = interval_of_difference(examples, others)
    verdict = _verdict(ends, run.mode(score))
    if " than" in verdict or " from" in verdict:
        verdict += f" {'its start' if other is run else other.name}"
    if last < max(run.scores("step")):
        verdict += f" (iteration {last})"
    interval = "-"
    if ends is not None:
        low, high = (format_number(end, "+") for end in ends)
        interval = f"{low} to {high}"
    return [verdict, format_number(difference, "+"), interval]


def _verdict(ends: tuple[float, float] | None, mode: str | None) -> str:
    """What an interval of differences says, the beginning of it."""
    if mode is None or ends is None:
        return "no verdict"
    if ends[0] <= 0 <= ends[1]:
        return "can't be told from"
    return "better than" if (ends[0] > 0) == (mode == "max") else "worse than"


def what_came_out(run: RunRecord, others: Sequence[RunRecord]) -> list[str]:
    """What to know before the scores are judged, in a few sentences."""
    steps = run.scores("step")
    if not steps:
        return ["No held-out scores were recorded: quality can't be judged."]
    text = []
    last, planned = max(steps), run.manifest["execution"].get("iterations")
    if isinstance(planned, int) and last < planned:
        text.append(f"The run isn't finished: {last} of {planned} iterations.")
    if not others:
        text.append(
            "There is no run to compare with: what plain fine-tuning would "
            "have done in the same steps isn't known."
        )
    for other in others:
        theirs = other.scores("step")
        last = max(steps.keys() & theirs.keys(), default=0)
        if last and steps[last] != theirs[last]:
            text.append(
                f"Not trained equally long until iteration {last}: "
                f"{run.name} {steps[last]} steps, {other.name} {theirs[last]}."
            )
    return [
        *text,
        "Each run is a single one: a difference can be chance, and only "
        "repeats with other seeds can say whether it is significant.",
    ]


def next_step(run: RunRecord, run_dir: Path) -> tuple[str, str]:
    """What to do now in words, and the command for it, which may be empty."""
    planned = run.manifest["execution"].get("iterations")
    done = max((i["iteration"] for i in run.of_kind("iteration")), default=0)
    config, model = run_dir / "config.yaml", run_dir / "model"
    if isinstance(planned, int) and done < planned and not config.exists():
        return "Start the run's program again: it goes on where it stopped.", ""
    if isinstance(planned, int) and done < planned:
        return "Go on with the run:", _command("run", config)
    if (model / "config.json").exists():
        ask = _command("generate", "--preset", model, "How are you?")
        return "Ask its model:", ask
    text = "Write its model, for this package, transformers and vLLM"
    if config.exists():
        return f"{text}:", _command("export", run_dir, "--out", model)
    call = f"keras_iris.export(causal_lm, {json.dumps(str(model))})"
    return f"{text}, at the end of the run's program:", call


def _command(*words: str | Path) -> str:
    return shlex.join(["keras-iris", *map(str, words)])


def _means(
    lines: Sequence[Line], columns: str, write: Callable[[float], str]
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the means over the lines of each iteration."""
    names = [n for n in columns.split() if any(n in line for line in lines)]
    rows = []
    for iteration in sorted({line["iteration"] for line in lines}):
        own = [line for line in lines if line["iteration"] == iteration]
        values = [[line[n] for line in own if n in line] for n in names]
        means = [write(sum(v) / len(v)) if v else "-" for v in values]
        rows.append([str(iteration), *means])
    return ["iteration", *names], rows


def make_answers(
    run: RunRecord, others: Sequence[RunRecord]
) -> list[list[tuple[str, str]]]:
    """For each held-out prompt the names and texts to show.

    Prompt, annotated response, and the answers before self-play, after each
    iteration, and of other runs at their ends.
    """
    theirs = [(other.name, other.answers()) for other in others]
    shown = []
    for number, by_iteration in sorted(run.answers().items()):
        first = by_iteration[min(by_iteration)]
        lines = [("prompt", first["prompt"]), ("annotated", first["annotated"])]
        for iteration, line in sorted(by_iteration.items()):
            name = f"iteration {iteration}" if iteration else "before"
            lines.append((name, line["answer"]))
        for name, answers in theirs:
            if own := answers.get(number):
                lines.append((name, own[max(own)]["answer"]))
        shown.append(lines)
    return shown
