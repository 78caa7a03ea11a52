"""Self-play without noise: a "language model" that is a table.

    python benchmarks/tabular.py [--figures docs]

The one response is one of 20 symbols, the policy is a table of their logits,
and the loss sees every pair of an annotated and a synthetic symbol, weighted by
its probability: all expectations are exact, in float64. Losses, gap and order
are the package's own; only the gradient step is this program's.

- Equal steps: five iterations of 10 steps of gradient descent, for each method
  at the rate of a grid that ends nearest to the data. SFT is the control.
- Solved: each iteration goes on until the loss is at its minimum (natural
  gradient), to see where an objective leads and not how fast.
- The gap against the divergence of order 2 that it bounds, exact and estimated
  from samples.
- The loss near the opponent against its second-order view,
  `-d'E g + d'(J + (1 - alpha)(V - F))d / 2`: `g` the score under the opponent,
  `F` and `V` its covariances under opponent and data, `J` the observed
  information.

T-SPIN sees triples from the second iteration on, with a symbol of the first
policy. What an exact table can't show is noise, which training on samples is
full of.
"""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import numpy as np
import records
import tabular_checks
import tabular_plots
from tabular_problem import (
    ADAPTIVE,
    METHODS,
    ORDERS,
    SETTINGS,
    kl,
    make_problem,
    play,
)

QUICK = {"iterations": 2, "steps": 4, "steps_until_solved": 8, "samples": 4}


def run_methods(settings):
    """Every method with equal steps, at its best rate, and solved.

    Returns:
        By method: `kl`, of every step; `rate`; `orders`, of the iterations;
        `log_probs`, of the opponents; `solved`, KL of the opponents.
    """
    log_data, _ = make_problem(settings["symbols"])
    found = {}
    for name in METHODS:
        log_probs, orders = play(name, settings)
        distances = kl(log_data, log_probs)
        best = np.nanargmin(distances[:, -1])
        solved, _ = play(name, settings, is_solved=True)
        found[name] = {
            "kl": distances[best],
            "rate": settings["rates"][best],
            "orders": orders[best],
            "log_probs": log_probs[best, :: settings["steps"]],
            "solved": kl(
                log_data, solved[0, :: settings["steps_until_solved"]]
            ),
        }
    return found


def make_bars(found, gaps, second):
    """What has to hold to rounding."""
    orders = [f"IRIS {a:g}" for a in ORDERS]
    same = np.abs(found["IRIS 1"]["kl"] - found["SFT"]["kl"]).max()
    solved = max(found[name]["solved"][-1] for name in orders)
    largest = {
        key: max(abs(row[key]) for row in second)
        for key in ("gradient error", "hessian error")
    }
    ratios = [row["error ratio"] for row in second]
    excess = max(
        *(gap - divergence for divergence, gap in gaps[1]),
        *(row["gap"] - row["D_2"] for row in gaps[0]),
    )
    return [
        records.bar("IRIS 1 is SFT: KL apart", same, at_most=1e-10),
        records.bar("IRIS, solved: largest KL", solved, at_most=1e-8),
        records.bar("gap above D_2, largest", excess, at_most=1e-8),
        records.bar(
            "gradient at the opponent, apart from SFT's",
            largest["gradient error"],
            at_most=1e-12,
        ),
        records.bar(
            "Hessian at the opponent, apart from the view's",
            largest["hessian error"],
            at_most=1e-10,
        ),
        # Of third order: 1/8.
        records.bar(
            "error of the view at half the step",
            max(ratios),
            at_most=0.14,
        ),
    ]


def draw(folder, settings, found, gaps, views):
    """Draws both figures."""
    log_data, start = make_problem(settings["symbols"])
    log_old = np.asarray(jax.nn.log_softmax(start))
    tabular_plots.draw_convergence(
        folder / "tabular_convergence.png", settings, found, gaps
    )
    orders = np.linspace(0, 3, 61)
    tabular_plots.draw_concentration(
        folder / "tabular_weights.png",
        log_data - log_old,
        {
            a: tabular_checks.relative_weights(log_data, log_old, a)
            for a in ORDERS
        },
        (
            orders,
            tabular_checks.sample_sizes(log_data, log_old, settings, orders),
        ),
        views,
    )


def main():
    """Plays, measures and draws."""
    arguments = records.parse_arguments(
        __doc__, figures={"type": Path, "help": "folder of the pictures"}
    )
    keras.config.set_floatx("float64")
    settings = SETTINGS | (QUICK if arguments.quick else {})
    found = run_methods(settings)
    gaps = tabular_checks.measure_gaps(settings)
    second, views = tabular_checks.check_second_order(settings)
    if arguments.figures:
        draw(arguments.figures, settings, found, gaps, views)
    records.finish(
        __file__,
        arguments,
        settings=settings,
        rows=[
            {
                "method": name,
                "rate": each["rate"],
                **{
                    f"KL {i}": float(each["kl"][i * settings["steps"]])
                    for i in (0, 1, 2, settings["iterations"])
                },
                # Beyond that it is rounding.
                "solved 1": abs(round(float(each["solved"][1]), 9)),
                "solved last": abs(round(float(each["solved"][-1]), 9)),
            }
            for name, each in found.items()
        ],
        bars=make_bars(found, gaps, second),
        gaps=gaps[0],
        second_order=second,
        orders=found[ADAPTIVE]["orders"].tolist(),
    )


if __name__ == "__main__":
    main()
