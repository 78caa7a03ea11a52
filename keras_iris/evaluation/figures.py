"""Draws the plots of a report, without global state of matplotlib."""

import io
import math
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from keras_iris.evaluation.panels import (
    Curve,
    Panel,
    Plot,
    mean_window,
    running_mean,
)

WIDTH_INCHES = 8.5
_FONT_SIZE = 9.5


@dataclass(frozen=True)
class Theme:
    """Colours; those of curves are told apart by colour-blind readers too.

    Reference: Okabe and Ito, "Color Universal Design", 2008.
    """

    background: str
    ink: str
    muted: str
    faint: str
    curves: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#59636e",
    faint="#d5dae0",
    curves=("#0072b2", "#d55e00", "#007f5f", "#a8487f"),
)
DARK = Theme(
    background="#16191d",
    ink="#e8eaed",
    muted="#9aa4af",
    faint="#383f47",
    curves=("#56b4e9", "#e69f00", "#2fc79a", "#e39ac1"),
)
_MARKERS = ("o", "s", "^", "D")


def draw_png(plot: Plot, theme: Theme) -> bytes:
    """Draws a plot as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(plot, theme)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def draw(plot: Plot, theme: Theme) -> Any:
    """Draws a plot as a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    num_rows = -(-len(plot.panels) // plot.num_columns)
    panel_inches = 2.4 if num_rows > 1 or plot.num_columns > 1 else 2.8
    figure = Figure(
        figsize=(WIDTH_INCHES, num_rows * panel_inches),
        dpi=160,
        facecolor=theme.background,
        layout="constrained",
    )
    grid = figure.subplots(num_rows, plot.num_columns, squeeze=False)
    axes = list(grid.flat)
    for panel, ax in zip(plot.panels, axes, strict=False):
        # Above the first axes the iterations are named.
        is_named = plot.starts and ax is axes[0]
        _draw_title(ax, panel, theme, pad=18 if is_named else 8)
        _draw_panel(ax, panel, plot.starts, theme)
        _label_curves(ax, panel, theme, panel_inches)
    for ax in axes[len(plot.panels) :]:
        ax.set_axis_off()
    if plot.starts:
        _label_iterations(axes[0], plot.starts, theme)
        for ax in axes[:-1]:
            ax.tick_params(labelbottom=False)
    for ax in axes[max(0, len(plot.panels) - plot.num_columns) :]:
        ax.set_xlabel("step", fontsize=_FONT_SIZE, color=theme.muted)
    return figure


def spread(positions: list[float], distance: float) -> list[float]:
    """Moves positions apart, in their order, by at least `distance`.

    Neighbours that are too close become a stack around their mean.
    """
    order = np.argsort(positions, kind="stable")
    stacks: list[list[float]] = []
    for position in np.asarray(positions, float)[order]:
        stacks.append([float(position)])
        while len(stacks) > 1 and _overlap(stacks[-2], stacks[-1], distance):
            above = stacks.pop()
            stacks[-1] += above
    moved = np.empty(len(positions))
    moved[order] = [p for s in stacks for p in _stacked(s, distance)]
    return moved.tolist()


def _stacked(stack: list[float], distance: float) -> list[float]:
    middle = sum(stack) / len(stack)
    first = middle - distance * (len(stack) - 1) / 2
    return [first + distance * i for i in range(len(stack))]


def _overlap(below: list[float], above: list[float], distance: float) -> bool:
    top, bottom = _stacked(below, distance)[-1], _stacked(above, distance)[0]
    return bottom - top < distance


def _draw_title(ax: Any, panel: Panel, theme: Theme, pad: float) -> None:
    ax.set_title(
        panel.title,
        loc="left",
        fontsize=_FONT_SIZE + 0.5,
        color=theme.ink,
        pad=pad,
        parse_math=False,
    )


def _draw_panel(
    ax: Any, panel: Panel, starts: dict[int, int], theme: Theme
) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax.set_facecolor(theme.background)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(theme.faint)
    ax.tick_params(
        labelsize=_FONT_SIZE - 1, colors=theme.muted, color=theme.faint
    )
    ax.margins(x=0.04 if panel.points else 0.01)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    if panel.zero:
        ax.axhline(0, color=theme.muted, linewidth=0.8, zorder=1)
    for start in list(starts.values())[1:]:
        ax.axvline(start - 0.5, color=theme.faint, linewidth=1, zorder=0)
    for i, curve in enumerate(panel.curves):
        _draw_curve(ax, panel, curve, theme.curves[i % len(theme.curves)], i)
    if panel.limits:
        low, high = panel.limits
        ax.set_ylim(low, high + 0.02 * (high - low))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_curve(
    ax: Any, panel: Panel, curve: Curve, color: str, index: int
) -> None:
    if panel.points:
        segment = curve.segments[0]
        ax.plot(
            segment.steps,
            segment.values,
            color=color,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.6,
            linestyle="-" if index == 0 else "--",
            # The run itself lies on top.
            zorder=4 if index == 0 else 3,
            clip_on=False,
        )
        return
    window = mean_window(curve)
    marker = "o" if window == 1 else ""
    for segment in curve.segments:
        ax.plot(
            segment.steps,
            segment.values,
            color=color,
            alpha=0.3 if window > 1 else 1.0,
            linewidth=0.7,
            marker=marker,
            markersize=2.5,
            zorder=2,
        )
        if window > 1:
            mean = running_mean(segment.values, window)
            ax.plot(segment.steps, mean, color=color, linewidth=1.8, zorder=3)


def _label_curves(ax: Any, panel: Panel, theme: Theme, inches: float) -> None:
    """Writes the labels where the curves end, apart from each other."""
    if len(panel.curves) < 2:
        return
    low, high = ax.get_ylim()
    ends = [_end(panel, curve) for curve in panel.curves]
    ends = [end if math.isfinite(end) else low for end in ends]
    ends = [min(max(end, low), high) for end in ends]
    # Room for a line of text, in units of the data.
    distance = 1.6 * _FONT_SIZE / 72 / inches * (high - low)
    colors = cycle(theme.curves)
    for curve, end, color in zip(
        panel.curves, spread(ends, distance), colors, strict=False
    ):
        ax.annotate(
            curve.label,
            xy=(1, end),
            xycoords=ax.get_yaxis_transform(),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=_FONT_SIZE,
            color=color,
            annotation_clip=False,
            parse_math=False,
        )


def _end(panel: Panel, curve: Curve) -> float:
    values = curve.segments[-1].values
    if not panel.points:
        values = running_mean(values, mean_window(curve))
    return float(values[-1])


def _label_iterations(ax: Any, starts: dict[int, int], theme: Theme) -> None:
    """Names the iterations above the first pair of axes."""
    for i, (iteration, start) in enumerate(starts.items()):
        ax.annotate(
            f"iteration {iteration}" if i == 0 else str(iteration),
            xy=(start - 0.5 if i else start, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=_FONT_SIZE - 1.5,
            color=theme.muted,
            annotation_clip=False,
        )
