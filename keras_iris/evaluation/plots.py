"""The plots of a report, without lasting state of matplotlib."""

import io
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_iris.evaluation.run_record import RunRecord
from keras_iris.self_play.run_log import Line

# Plot, title of the panel, values of the training steps.
_TRAINING = [
    ("alpha_and_gap", "gap (nats)", "gap"),
    ("alpha_and_gap", "order alpha", "alpha"),
    ("ess_and_nll", "effective sample size (share)", "real_ess synthetic_ess"),
    ("ess_and_nll", "NLL (nats per token)", "real_nll synthetic_nll"),
    ("margin", "margin (nats)", "margin"),
    ("margin", "log-ratio (nats)", "real_log_ratio synthetic_log_ratio"),
]
# A stretch for each iteration of training steps, or one of evaluations:
# iterations, steps and values, of shape (3, n).
Curve = list[np.ndarray]
_NUM_WINDOWS = 30  # over which a curve's mean is drawn
# The page has its own for light and dark. Readers who are colour-blind can
# tell the curves apart, too (Okabe and Ito, 2008).
_INK, _MUTED, _FAINT = "#1f2328", "#59636e", "#d5dae0"
_CURVES = "#0072b2", "#d55e00", "#007f5f", "#a8487f"
_STYLE = {
    "font.size": 8.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "svg.fonttype": "none",
}


class Panel(NamedTuple):
    """A pair of axes, of training steps or of evaluations."""

    title: str
    curves: dict[str, Curve]
    is_training: bool


def make_plots(run: RunRecord) -> dict[str, list[Panel]]:
    """The panels of each plot for which the run has numbers."""
    plots: dict[str, list[Panel]] = {}
    for score in run.score_names():
        runs = {r.name: r.of_kind("evaluation") for r in (run, *run.others)}
        scores = {name: _points(lines, score) for name, lines in runs.items()}
        curves = {name: [p] for name, p in scores.items() if p.size}
        panel = Panel(run.label(score), curves, is_training=False)
        plots.setdefault("scores", []).append(panel)
    for plot, title, names in _TRAINING:
        values = {n: _points(run.of_kind("step"), n) for n in names.split()}
        curves = {
            name: np.split(p, np.flatnonzero(np.diff(p[0])) + 1, axis=1)
            for name, p in values.items()
            if p.size
        }
        if curves:
            panel = Panel(title, curves, is_training=True)
            plots.setdefault(plot, []).append(panel)
    return plots


def _points(lines: Sequence[Line], name: str) -> np.ndarray:
    points = [(v["iteration"], v["step"], v[name]) for v in lines if name in v]
    return np.array(sorted(points), float).T


def draw_svg(panel: Panel) -> str:
    """Draws a panel in the colours and font of the page around it."""
    from matplotlib import rc_context

    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    options = {"format": "svg", "transparent": True, "metadata": nothing}
    with rc_context(_STYLE):
        draw([panel]).savefig(file, **options)
    svg = file.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    for i, color in enumerate([_INK, _MUTED, _FAINT, *_CURVES]):
        svg = svg.replace(color, f"var(--color-{i})")
    return svg


def draw(panels: Sequence[Panel]) -> Any:
    """Draws panels, two a row, as a `matplotlib.figure.Figure`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    size = (4.4 * columns, 2.7 * rows)
    with rc_context(_STYLE):
        figure = Figure(size, 160, facecolor="white", layout="constrained")
        for i, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, i + 1), panel)
    return figure


def _draw_panel(ax: Any, panel: Panel) -> None:
    curves = enumerate(panel.curves.values())
    lines = [_draw_curve(ax, i, c, panel.is_training) for i, c in curves]
    ax.set_title(textwrap.fill(panel.title, 50), loc="left", size=10, pad=16)
    if len(lines) > 1:
        labels = [" " + textwrap.fill(label, 24) for label in panel.curves]
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.24), "ncols": 2}
        ax.legend(lines, labels, frameon=False, borderpad=0, **below)
    ax.locator_params(axis="x", nbins=5, integer=True)
    ax.locator_params(axis="y", nbins=5)
    low, high = ax.get_ylim()
    if 0 < low < high / 2:
        ax.set_ylim(bottom=0)
    elif low < 0 < high:
        ax.axhline(0, color=_MUTED, linewidth=0.8, zorder=1)
    ax.set_xlabel("step, iterations above" if panel.is_training else "step")
    stretches = next(iter(panel.curves.values())) if panel.is_training else []
    for i, (iterations, steps, _) in enumerate(stretches):
        ax.axvline(steps[0] - 0.5, color=_FAINT, linewidth=1, zorder=0)
        if i % (1 + len(stretches) // 15) == 0:
            number, place = f"{iterations[0]:.0f}", (steps[0] - 0.5, 1.02)
            across = ax.get_xaxis_transform()
            ax.annotate(number, place, xycoords=across, color=_MUTED, size=7.5)


def _draw_curve(ax: Any, index: int, curve: Curve, is_training: bool) -> Any:
    """Draws a curve; returns its last line."""
    from pandas import Series

    num_points = sum(stretch.shape[1] for stretch in curve)
    window = max(num_points // _NUM_WINDOWS, 1) // 2 * 2 + 1
    # The run itself lies on top.
    style = {"color": _CURVES[index % 4], "zorder": 9 - index}
    if not is_training:
        style |= {"marker": "os^D"[index % 4], "ls": "--" if index else "-"}
    elif window == 1:
        style |= {"marker": ".", "markersize": 4}
    for _, steps, values in curve:
        if is_training and window > 1:
            ax.plot(steps, values, **style, alpha=0.3, linewidth=0.7)
            around = Series(values).rolling(window, center=True, min_periods=1)
            values = around.mean()
        (line,) = ax.plot(steps, values, **style, linewidth=1.7)
    return line
