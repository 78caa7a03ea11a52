"""What the plots of a report show, as data."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from keras_iris.evaluation.metrics_file import Line
from keras_iris.evaluation.outcome import direction
from keras_iris.evaluation.run_record import RunRecord

# A mean is drawn over this many stretches of a run.
_NUM_WINDOWS = 30


@dataclass(frozen=True)
class Segment:
    """A stretch of a curve: steps and values, both of shape `(n,)`."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Curve:
    """A labelled curve, in one segment or one an iteration."""

    label: str
    segments: list[Segment]


@dataclass(frozen=True)
class Panel:
    """A pair of axes.

    Attributes:
        title: What the axes show, with the unit.
        curves: The curves.
        limits: Limits of the values, or None for those of the data.
        zero: Whether a line marks 0.
        points: Whether each value gets a marker, and no mean is drawn.
    """

    title: str
    curves: list[Curve]
    limits: tuple[float, float] | None = None
    zero: bool = False
    points: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
        name: File name without its ending.
        title: What it shows.
        caption: How to read it.
        panels: Its axes.
        starts: First step of each iteration, by number.
        num_columns: Axes side by side.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]
    starts: dict[int, int]
    num_columns: int = 1


def step_curve(lines: Sequence[Line], name: str, label: str) -> Curve:
    """A value over the steps, in a segment for each iteration."""
    points: dict[int, list[tuple[int, float]]] = {}
    for line in lines:
        if line.get("kind") == "step" and name in line:
            point = (line["step"], float(line[name]))
            points.setdefault(line["iteration"], []).append(point)
    segments = []
    for iteration in sorted(points):
        steps, values = zip(*sorted(points[iteration]), strict=True)
        segments.append(Segment(np.array(steps), np.array(values)))
    return Curve(label, segments)


def iteration_starts(lines: Sequence[Line]) -> dict[int, int]:
    """The first step of each iteration."""
    starts: dict[int, int] = {}
    for line in lines:
        if line.get("kind") == "step":
            iteration, step = line["iteration"], line["step"]
            starts[iteration] = min(starts.get(iteration, step), step)
    return starts


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, fewer at the ends.

    Args:
        values: Shape `(n,)`; those that aren't finite are left out.
        window: An odd number.

    Returns:
        Shape `(n,)`; NaN where nothing finite is near.
    """
    finite = np.isfinite(values)
    total = _window_sum(np.where(finite, values, 0.0), window)
    count = _window_sum(finite.astype(float), window)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _window_sum(values: np.ndarray, window: int) -> np.ndarray:
    half = window // 2
    padded = np.pad(values, half)
    return np.convolve(padded, np.ones(2 * half + 1), mode="valid")


def mean_window(curve: Curve) -> int:
    """Steps of a curve's running mean, an odd number; 1 for none."""
    num_steps = sum(len(segment.steps) for segment in curve.segments)
    return max(num_steps // _NUM_WINDOWS, 1) // 2 * 2 + 1


def make_plots(run: RunRecord, others: Sequence[RunRecord]) -> list[Plot]:
    """The plots for which the run has numbers."""
    plots = [
        _scores(run, others),
        _alpha_and_gap(run),
        _effective_sample_size(run),
        _margin(run),
    ]
    return [plot for plot in plots if plot.panels]


def _scores(run: RunRecord, others: Sequence[RunRecord]) -> Plot:
    panels = []
    for name in run.score_names():
        curves = []
        for record in (run, *others):
            steps = record.evaluation_steps()
            scores = sorted(
                (steps[i], v) for i, v in record.scores(name).items()
            )
            if scores:
                x, y = (np.array(v) for v in zip(*scores, strict=True))
                curves.append(Curve(record.name, [Segment(x, y)]))
        way = direction(name)
        title = f"{name}\n{way} is better" if way else name
        panels.append(Panel(title, curves, points=True))
    return Plot(
        "scores",
        "Scores over the run",
        "A point is an evaluation on held-out data; the first is before "
        "self-play.",
        panels,
        {},
        num_columns=min(3, max(1, len(panels))),
    )


def _step_plot(
    run: RunRecord, name: str, title: str, caption: str, panels: list[Panel]
) -> Plot:
    """A plot over steps, without the panels that have no numbers."""
    panels = [
        Panel(
            panel.title,
            [curve for curve in panel.curves if curve.segments],
            panel.limits,
            panel.zero,
        )
        for panel in panels
    ]
    panels = [panel for panel in panels if panel.curves]
    starts = iteration_starts(run.lines)
    windows = {mean_window(curve) for p in panels for curve in p.curves}
    if windows and max(windows) > 1:
        caption += f" Bold: the running mean of {max(windows)} steps."
    return Plot(name, title, caption, panels, starts)


def _alpha_and_gap(run: RunRecord) -> Plot:
    return _step_plot(
        run,
        "alpha_and_gap",
        "Order and gap",
        "The gap is how much less likely, per token, the model finds the "
        "annotated responses than its own; a scheduler lets alpha follow it.",
        [
            Panel("order alpha", [step_curve(run.lines, "alpha", "alpha")]),
            Panel(
                "gap (nats per token)",
                [step_curve(run.lines, "gap", "gap")],
                zero=True,
            ),
        ],
    )


def _effective_sample_size(run: RunRecord) -> Plot:
    return _step_plot(
        run,
        "effective_sample_size",
        "Effective sample size",
        "How many examples carry the gradient, as a share of the batch: "
        "100% where all weigh the same, near 0% where one decides.",
        [
            Panel(
                "effective sample size (share of the batch)",
                [
                    step_curve(run.lines, "real_ess", "annotated"),
                    step_curve(run.lines, "synthetic_ess", "synthetic"),
                ],
                limits=(0.0, 1.0),
            )
        ],
    )


def _margin(run: RunRecord) -> Plot:
    return _step_plot(
        run,
        "margin",
        "Margin and log-ratios",
        "Log-ratios are those of the policy to its opponent, the model at "
        "the start of the iteration: so all begin at 0 again. The margin is "
        "annotated minus synthetic.",
        [
            Panel(
                "margin (nats)",
                [step_curve(run.lines, "margin", "margin")],
                zero=True,
            ),
            Panel(
                "log-ratio to the opponent (nats)",
                [
                    step_curve(run.lines, "real_log_ratio", "annotated"),
                    step_curve(run.lines, "synthetic_log_ratio", "synthetic"),
                ],
                zero=True,
            ),
        ],
    )
