"""What a report says: tables, and a few sentences."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from keras_iris.evaluation.run_record import RunRecord
from keras_iris.metrics import interval_of_difference
from keras_iris.self_play.run_log import Line

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


def make_tables(run: RunRecord) -> list[Table]:
    """The tables for which the run has numbers, that of scores first."""
    timing = run.of_kind("iteration") + [
        {"iteration": iteration, "evaluate_seconds": seconds}
        for iteration, seconds in run.scores("seconds").items()
    ]
    tables = [
        _scores(run),
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


def _scores(run: RunRecord) -> Table:
    iterations = sorted(run.scores("step"))
    rows = []
    for score, other in product(run.score_names(), (run, *run.others)):
        label = run.label(score) if other is run else ""
        values = {i: format_number(v) for i, v in other.scores(score).items()}
        cells = [values.get(i, "-") for i in iterations]
        rows.append([label, other.name, *compare(run, other, score), *cells])
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
    name = other.name
    if other is run:
        name, theirs = "its start", {i: ours[0] for i in ours if 0 in ours}
    last = max(ours.keys() & theirs.keys(), default=0)
    if last == 0:
        return ["-", "-", "-"]
    difference = ours[last] - theirs[last]
    if not math.isfinite(difference):
        return ["not comparable", "-", "-"]
    verdict, interval = "no verdict", "-"
    mine = run.examples(score, last)
    others = other.examples(score, 0 if other is run else last)
    # Of the same examples, and not only of as many.
    if (
        mine is not None
        and others is not None
        and np.array_equal(mine.weights, others.weights)
    ):
        low, high = interval_of_difference(mine, others)
        interval = f"{format_number(low, '+')} to {format_number(high, '+')}"
        mode = run.mode(score)
        if mode and low <= 0 <= high:
            verdict = f"can't be told from {name}"
        elif mode:
            word = "better" if (low > 0) == (mode == "max") else "worse"
            verdict = f"{word} than {name}"
    if last < max(run.scores("step")):
        verdict += f" (iteration {last})"
    return [verdict, format_number(difference, "+"), interval]


def what_came_out(run: RunRecord) -> list[str]:
    """What to know before the scores are judged, in a few sentences."""
    steps = run.scores("step")
    if not steps:
        return ["No held-out scores were recorded: quality can't be judged."]
    text = []
    last, planned = max(steps), run.manifest["execution"].get("iterations")
    if isinstance(planned, int) and last < planned:
        text.append(f"The run isn't finished: {last} of {planned} iterations.")
    if not run.others:
        text.append(
            "There is no run to compare with: what plain fine-tuning would "
            "have done in the same steps isn't known."
        )
    for other in run.others:
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


def make_answers(run: RunRecord) -> list[list[tuple[str, str]]]:
    """For each held-out prompt the names and texts to show.

    Prompt, annotated response, and the answers before self-play, after each
    iteration, and of other runs at their ends.
    """
    shown: dict[int, list[tuple[str, str]]] = {}
    for (number, iteration), line in sorted(run.answers().items()):
        given = [(name, line[name]) for name in ("prompt", "annotated")]
        name = f"iteration {iteration}" if iteration else "before"
        shown.setdefault(number, given).append((name, line["answer"]))
    for other in run.others:
        lines = sorted(other.answers().items())
        ends = {number: line["answer"] for (number, _), line in lines}
        for number in shown.keys() & ends.keys():
            shown[number].append((other.name, ends[number]))
    return list(shown.values())
