"""The two figures of tabular.py: how fast, and what the weights do."""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

# Readers who are colour-blind can tell them apart (Okabe and Ito, 2008).
COLORS = {
    "SFT": "#1f2328",
    "SPIN 0.1": "#e69f00",
    "SPIN 1": "#d55e00",
    "SPACE 1": "#007f5f",
    "SPIF 1": "#a8487f",
    "T-SPIN": "#8c6d31",
    "IRIS adaptive": "#0072b2",
}
# Blue below order 1, dark at it, brown above.
ORDER_COLORS = {
    0.25: "#08519c",
    0.5: "#4292c6",
    0.75: "#9ecae1",
    1.0: "#1f2328",
    1.5: "#fdae6b",
    2.0: "#e6550d",
    3.0: "#7f2704",
}
STYLE = {
    "font.size": 8.5,
    "axes.edgecolor": "#8b949e",
    "axes.grid": True,
    "axes.labelcolor": "#59636e",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "xtick.color": "#59636e",
    "ytick.color": "#59636e",
}
FLOOR = 1e-6  # nats; below it nothing is shown


def save(file, title, panels):
    """Draws four panels, each a function of axes, two a row.

    The ground is white, for pages light and dark.
    """
    with rc_context(STYLE):
        figure = Figure((9.4, 6.8), 120, facecolor="white")
        figure.set_layout_engine("constrained", h_pad=0.1, w_pad=0.1)
        for number, panel in enumerate(panels):
            panel(figure.add_subplot(2, 2, number + 1))
        figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
        figure.savefig(file, metadata={"Software": None})


def mark_iterations(axes, settings):
    """Lines where a new opponent is taken."""
    for iteration in range(1, settings["iterations"]):
        axes.axvline(
            iteration * settings["steps"], color="#c4cad0", linewidth=1
        )
    axes.set(xlabel="step; a new opponent at each line", ylabel="KL, nats")


def draw_methods(axes, settings, found):
    """KL against steps, the other objectives beside IRIS."""
    for name, color in COLORS.items():
        style = {"ls": "--", "zorder": 5} if name == "SFT" else {}
        axes.semilogy(found[name]["kl"], color=color, label=name, **style)
    axes.set_title("KL of data from policy, equal steps")
    mark_iterations(axes, settings)
    axes.set_ylim(top=100)  # room for the legend
    axes.legend(ncols=2, loc="upper right")


def draw_orders(axes, settings, found):
    """KL against steps, by order."""
    for name, each in found.items():
        if name.startswith("IRIS ") and name != "IRIS adaptive":
            alpha = each["orders"][0]
            axes.semilogy(
                each["kl"], color=ORDER_COLORS[alpha], label=f"{alpha:g}"
            )
    adaptive = found["IRIS adaptive"]
    color = COLORS["IRIS adaptive"]
    axes.semilogy(adaptive["kl"], color=color, ls=":", label="adaptive")
    axes.set_title("The same, IRIS by order")
    mark_iterations(axes, settings)
    axes.legend(ncols=3, title="alpha (1 is SFT)", alignment="left")


def draw_solved(axes, found):
    """KL after iterations that are solved."""
    shown = {
        "SPIN 0.1": COLORS["SPIN 0.1"],
        "SPIF 1": COLORS["SPIF 1"],
        "T-SPIN": COLORS["T-SPIN"],
        "IRIS 3": ORDER_COLORS[3.0],
        "IRIS 2": ORDER_COLORS[2.0],
    }
    curves = {name: found[name]["solved"] for name in shown}
    others = [found[name]["solved"] for name in found if name not in shown]
    curves["all others"] = np.max(others, axis=0)
    for (name, values), marker in zip(curves.items(), "os^vPD", strict=True):
        axes.semilogy(
            np.maximum(values, FLOOR),
            marker=marker,
            ms=4,
            color=shown.get(name, COLORS["SFT"]),
            label=name,
        )
    axes.set_ylim(FLOOR / 2, 3e3)
    axes.set_title("The same, each iteration to its minimum")
    axes.set(
        xlabel=f"iteration; what is below {FLOOR:g} lies on it",
        ylabel="KL, nats",
    )
    axes.locator_params(axis="x", integer=True)
    axes.legend(ncols=3, fontsize=8)


def draw_gaps(axes, settings, gaps):
    """The gap against the divergence that it bounds."""
    rows, pairs = gaps
    divergence = [row["D_2"] for row in rows]
    top = max(divergence) * 1.05
    axes.plot([0, top], [0, top], color="#59636e", lw=1)
    axes.annotate("gap = divergence", (top * 0.66, top * 0.7), rotation=32)
    pairs = pairs[pairs[:, 0] < top]
    axes.plot(*pairs.T, ".", ms=4, color="#9aa3ab", label="random problems")
    axes.errorbar(
        divergence,
        [row["sampled"] for row in rows],
        [2 * row["deviation"] for row in rows],
        color=COLORS["IRIS adaptive"],
        marker="o",
        ms=4,
        capsize=3,
        label=(
            f"this one, {settings['sampled_pairs']:,} sampled pairs\n"
            "(bars: 2 standard deviations)"
        ),
    )
    axes.set(xlim=(0, top), ylim=(-0.05, top))
    axes.set_title("The gap, a lower bound of the divergence")
    axes.set(xlabel="divergence of order 2, nats", ylabel="gap, nats")
    axes.legend(loc="upper left")


def draw_weights(axes, ratio, weights, title):
    """Importance of a response against its log-ratio."""
    order = np.argsort(ratio)
    for alpha, values in weights.items():
        axes.semilogy(
            ratio[order],
            values[order],
            color=ORDER_COLORS[alpha],
            marker=".",
            ms=5,
            lw=1.2,
            label=f"{alpha:g}",
        )
    axes.set_title(title)
    axes.set(
        xlabel="log-ratio r where policy = data, nats",
        ylabel="weight, 1 if all count alike",
    )
    axes.legend(title="alpha", ncols=2, alignment="left")


def draw_sample_sizes(axes, orders, sizes):
    """How much of a batch is left by order."""
    for name, values, color in zip(
        ("annotated", "synthetic"), sizes, ("#0072b2", "#d55e00"), strict=True
    ):
        axes.plot(orders, values, color=color, label=name)
    axes.axhline(0.5, color="#59636e", lw=1, ls="--")
    axes.annotate("what the guard keeps", (3, 0.52), ha="right")
    axes.set(xlabel="alpha", ylabel="share of a batch of 64", ylim=(0, 1.03))
    axes.set_title("Effective sample size of sampled batches")
    axes.legend()


def draw_errors(axes, views, orders):
    """How far the loss is from its second-order view."""
    steps = np.geomspace(0.01, 1, 9)
    for alpha in orders:
        errors = views["near"].errors(alpha, steps)
        axes.loglog(
            steps, errors, color=ORDER_COLORS[alpha], label=f"{alpha:g}"
        )
    scale = views["near"].errors(1.0, steps[:1])[0] / steps[0] ** 3
    axes.loglog(steps, 8 * scale * steps**3, "--", color="#59636e", lw=1)
    axes.annotate("third order", (0.03, 12 * scale * 0.03**3), ha="right")
    axes.set_title("Loss minus its second-order view")
    axes.set(
        xlabel="distance from the opponent, standard deviations of r",
        ylabel="nats",
    )
    axes.legend(title="alpha", ncols=2, alignment="left", loc="lower right")


def draw_convergence(file, settings, found, gaps):
    """The figure of KL and gap."""
    save(
        file,
        "A table of 20 symbols, exact expectations, best rate of each method",
        [
            lambda axes: draw_methods(axes, settings, found),
            lambda axes: draw_orders(axes, settings, found),
            lambda axes: draw_solved(axes, found),
            lambda axes: draw_gaps(axes, settings, gaps),
        ],
    )


def draw_concentration(file, ratio, weights, sizes, views):
    """The figure of weights.

    Args:
        file: Where it goes.
        ratio: Log-ratios of the symbols.
        weights: Annotated and synthetic ones by order.
        sizes: Orders, and effective sample sizes of shape `(2, orders)`.
        views: `SecondOrder` by name.
    """
    annotated = {alpha: pair[0] for alpha, pair in weights.items()}
    synthetic = {alpha: pair[1] for alpha, pair in weights.items()}
    save(
        file,
        "Which responses make the gradient of IRIS, by order",
        [
            lambda axes: draw_weights(
                axes, ratio, annotated, "Annotated: exp((alpha - 1) r)"
            ),
            lambda axes: draw_weights(
                axes, ratio, synthetic, "Synthetic: exp(alpha r)"
            ),
            lambda axes: draw_sample_sizes(axes, *sizes),
            lambda axes: draw_errors(axes, views, weights),
        ],
    )
