"""The tables of a report, as data and as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_iris.evaluation.outcome import compare
from keras_iris.evaluation.run_record import RunRecord

_TRAINING = {
    "alpha": "alpha",
    "gap": "gap",
    "margin": "margin",
    "margin_accuracy": "margin accuracy",
    "real_ess": "ESS annotated",
    "synthetic_ess": "ESS synthetic",
}
_TIMING = {
    "generate_seconds": "generate s",
    "score_seconds": "score s",
    "fit_seconds": "fit s",
    "tokens_per_second": "tokens/s",
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        header: Names of the columns.
        rows: Cells, as many a row as the header has.
        num_labels: Leading columns that are labels, not numbers.
        note: How to read it.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    num_labels: int = 1
    note: str = ""

    def text(self) -> str:
        """The table in plain text, labels on the left, numbers right."""
        cells = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [
                cell.ljust(width) if i < self.num_labels else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        note = [self.note] if self.note else []
        return "\n".join([self.title, *lines, *note])


def format_number(value: float | None) -> str:
    """Four decimals where that makes sense; `-` where there is no value."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.1e}"
    decimals = 4 if size < 10 else 2 if size < 1000 else 0
    return f"{value:,.{decimals}f}"


def format_difference(value: float) -> str:
    """A number with its sign."""
    return format_number(value) if value < 0 else "+" + format_number(value)


def score_table(run: RunRecord, others: Sequence[RunRecord]) -> Table:
    """Held-out scores by iteration, next to those of other runs."""
    iterations = sorted(run.evaluation_steps())
    rows = []
    for name in run.score_names():
        for record in (run, *others):
            scores = record.scores(name)
            difference = "" if record is run else _difference(run, record, name)
            rows.append(
                [
                    name if record is run else "",
                    record.name,
                    *(format_number(scores.get(i)) for i in iterations),
                    *([difference] if others else []),
                ]
            )
    return Table(
        "Held-out scores",
        [
            "score",
            "run",
            *(f"iteration {i}" if i else "start" for i in iterations),
            *(["difference"] if others else []),
        ],
        rows,
        num_labels=2,
        note=(
            f"difference: {run.name} minus the other, at the last iteration "
            "of both."
            if others
            else ""
        ),
    )


def _difference(run: RunRecord, other: RunRecord, name: str) -> str:
    for outcome in compare(run, other):
        if outcome.score == name:
            return format_difference(outcome.difference)
    return "-"


def training_table(run: RunRecord) -> Table:
    """Means of the training values over the steps of each iteration."""
    steps = run.of_kind("step")
    names = [n for n in _TRAINING if any(n in step for step in steps)]
    rows = []
    for iteration in sorted({step["iteration"] for step in steps}):
        own = [step for step in steps if step["iteration"] == iteration]
        values = [[step[n] for step in own if n in step] for n in names]
        means = [format_number(float(np.mean(v))) if v else "-" for v in values]
        rows.append([str(iteration), *means])
    return Table(
        "Training, mean over the steps of an iteration",
        ["iteration", *(_TRAINING[name] for name in names)],
        rows,
        note=(
            "gap in nats per token, margin in nats; ESS: effective sample "
            "size as a share of the batch."
        ),
    )


def timing_table(run: RunRecord) -> Table:
    """Seconds of the parts of each iteration, and tokens a second."""
    evaluations = {
        line["iteration"]: line.get("seconds")
        for line in run.of_kind("evaluation")
    }
    rows = [
        [
            str(line["iteration"]),
            *(_format_time(line.get(name)) for name in _TIMING),
            _format_time(evaluations.get(line["iteration"])),
        ]
        for line in run.of_kind("iteration")
    ]
    return Table(
        "Timing",
        ["iteration", *_TIMING.values(), "evaluate s"],
        rows,
        note=(
            "Of an iteration that was cut off and resumed, the time after "
            "that. tokens/s: response tokens while fitting."
        ),
    )


def _format_time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def manifest_table(run: RunRecord, part: str, title: str) -> Table:
    """A part of the manifest, such as `settings`, a line each."""
    values = run.manifest.get(part, {})
    rows = [[str(name), _format_setting(v)] for name, v in values.items()]
    return Table(title, ["name", "value"], rows, num_labels=2)


def _format_setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)
