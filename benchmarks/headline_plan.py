"""What headline_g2p.py runs: methods, settings and sizes, fixed in advance."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from keras_iris.losses import IRIS, SFT, SPACE, SPIF, SPIN, TSPIN

SETTINGS = {
    "model": {"layers": 2, "width": 64, "inner_width": 256},
    "words": {"pool": 4_000, "validation": 500, "test": 1_000},  # a seed
    "seeds": 5,
    "tuning_seeds": 2,  # the first ones
    "rates": [3e-4, 1e-3, 3e-3, 1e-2],
    "all_epochs": 8,  # of SFT on the whole pool
    "sft_rate": 3e-3,
    # What a setting of `GRID` may change.
    "annotated": 520,  # words, 13% of the pool
    "sft_epochs": 32,
    "noise": 0.0,  # share of phonemes that are wrong before self-play
    "batch_size": 32,
    "iterations": 3,
    "epochs": 2,  # an iteration
}


class Method(NamedTuple):
    """A way to go on from the first policy.

    Attributes:
        make: Makes the loss.
        alpha: The order; None where it follows the gap. Others ignore it.
        num_samples: Synthetic responses to a prompt.
    """

    make: Callable
    alpha: float | None = 1.0
    num_samples: int = 1


CONTROL = "SFT goes on"
ADAPTIVE = "IRIS adaptive"
METHODS = {
    CONTROL: Method(SFT),
    "SPIN 0.1": Method(functools.partial(SPIN, 0.1)),
    "SPIN 1": Method(functools.partial(SPIN, 1.0)),
    "SPACE": Method(SPACE),
    "SPIF 0.3": Method(functools.partial(SPIF, 0.3)),
    "T-SPIN": Method(TSPIN),
    **{f"IRIS {a:g}": Method(IRIS, a) for a in (0.5, 1.0, 1.5, 2.0)},
    ADAPTIVE: Method(IRIS, None),
    "IRIS 1, 4 answers": Method(IRIS, 1.0, num_samples=4),
    "IRIS adaptive, 4 answers": Method(IRIS, None, num_samples=4),
}


def _few(anchor=0.0, num_samples=1):
    """The control and four methods, for the grid."""
    makes = {
        "SPACE": (functools.partial(SPACE, sft_weight=anchor), 1.0),
        "SPIF 0.3": (functools.partial(SPIF, 0.3, sft_weight=anchor), 1.0),
        "T-SPIN": (functools.partial(TSPIN, sft_weight=anchor), 1.0),
        ADAPTIVE: (functools.partial(IRIS, sft_weight=anchor), None),
    }
    return {CONTROL: METHODS[CONTROL]} | {
        name: Method(*make, num_samples) for name, make in makes.items()
    }


FEW = _few()
# Where the plan's highest rate was the best one, a higher one was added after.
_RATES = {"rates": [*SETTINGS["rates"], 3e-2]}
# The question, fixed before it ran: in which of these settings does a method
# end with a lower NLL, or fewer greedy phoneme errors, than the control, by a
# 95% interval that excludes zero? By setting: what it changes, and the methods.
MAIN = "main"
GRID = {
    MAIN: ({}, METHODS),
    "many epochs": (
        {"annotated": 260, "sft_epochs": 64, "iterations": 4, "epochs": 4}
        | _RATES,
        FEW,
    ),
    "early start": ({"sft_epochs": 16} | _RATES, FEW),
    "noisy start": ({"noise": 0.15} | _RATES, FEW),
    "anchor": ({}, _few(anchor=1.0)),
    # As many answers and steps as in the main setting, all of the first policy.
    "one iteration": (
        {"iterations": 1, "epochs": 6},
        _few(num_samples=3),
    ),
}
