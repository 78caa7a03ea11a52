"""The figure of headline_g2p.py: differences from SFT, with intervals."""

from headline_statistics import is_reference
from matplotlib import rc_context
from matplotlib.figure import Figure
from tabular_plots import COLORS, STYLE

PANELS = {
    "nll": ("NLL", 1, "nats a token"),
    "per greedy": ("Phoneme errors, greedy", 100, "% of phonemes"),
    "per sampled": ("Phoneme errors, sampled", 100, "% of phonemes"),
    "acc greedy": ("Right words, greedy", 100, "% of words"),
}
BETTER, WORSE, UNSURE = COLORS["SPACE 1"], COLORS["SPIN 1"], "#8b949e"


def draw(file, compared, num_seeds):
    """Draws a row for each method and a panel for each score.

    Args:
        file: Where it goes.
        compared: What `headline_statistics.compare` gives, of all settings.
        num_seeds: What an interval is over.
    """
    rows = [each for each in compared if not is_reference(each)]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure((11, 1.8 + 0.21 * len(rows)), 120, facecolor="white")
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        panels = figure.subplots(1, len(PANELS), sharey=True)
        for axes, score in zip(panels, PANELS, strict=True):
            _draw_panel(axes, rows, score)
        places = _places(rows)
        panels[0].set_yticks(places, [each["method"] for each in rows])
        panels[0].set_ylim(max(places) + 0.8, -1.6)
        for place, name in _headings(rows, places).items():
            panels[0].annotate(
                name,
                (-0.02, place),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                weight="bold",
            )
        figure.suptitle(
            "Self-play minus SFT for as many steps: mean and 95% interval of "
            f"{num_seeds} seeds\ngreen is better, orange worse, grey can't be "
            "told apart",
            x=0.01,
            ha="left",
            size=10,
        )
        figure.savefig(file, metadata={"Software": None})


def _places(rows):
    """Heights of the rows; a setting begins after a gap."""
    places, height = [], 0.0
    for i, each in enumerate(rows):
        is_new = i > 0 and each["setting"] != rows[i - 1]["setting"]
        height += 2.4 if is_new else 1.0
        places.append(height)
    return places


def _headings(rows, places):
    """Names of settings by height, above the first row of each."""
    firsts = {}
    for place, each in zip(places, rows, strict=True):
        firsts.setdefault(each["setting"], place - 0.95)
    return {place: name for name, place in firsts.items()}


def _draw_panel(axes, rows, score):
    title, scale, unit = PANELS[score]
    is_higher_better = score.startswith("acc")
    for place, each in zip(_places(rows), rows, strict=True):
        mean, low, high = (scale * x for x in each["differences"][score])
        color = UNSURE
        if each["differences"][score].excludes_zero:
            color = BETTER if (mean > 0) == is_higher_better else WORSE
        axes.plot([low, high], [place, place], color=color, lw=1.8)
        axes.plot(mean, place, "o", color=color, ms=4.5)
    axes.axvline(0, color="#1f2328", lw=1, zorder=0)
    side = "right" if is_higher_better else "left"
    axes.set_title(title)
    axes.set_xlabel(f"{unit}; better to the {side}")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
