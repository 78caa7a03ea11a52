"""Rates chosen on validation words, and differences on test words."""

from typing import NamedTuple

import numpy as np
import scipy.stats
from headline_plan import CONTROL
from headline_runs import ALL, START

# By the score on validation words that chooses the rate for it: how good the
# distribution is, and how good the likeliest answer.
TUNED_BY = {
    "nll": "nll",
    "per sampled": "nll",
    "acc sampled": "nll",
    "per greedy": "per greedy",
    "acc greedy": "per greedy",
}
# Accuracies are better where they are higher.
IS_HIGHER_BETTER = {score: score.startswith("acc") for score in TUNED_BY}


class Difference(NamedTuple):
    """A mean over seeds of paired differences, and its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self):
        """Whether the interval does."""
        return self.low > 0 or self.high < 0


def tune(runs, setting, method):
    """Mean validation scores over the tuning seeds, of each rate.

    Returns:
        Dictionaries: "rate", "nll", "per greedy"; none for a reference.
    """
    seeds = range(runs.settings["tuning_seeds"])
    found = []
    rates = runs.setting(setting)["rates"]
    for rate in rates if method not in (START, ALL) else []:
        scores = [
            runs.get(setting, method, rate, seed)["validation"]
            for seed in seeds
        ]
        means = {
            by: float(np.mean([each[by] for each in scores]))
            for by in TUNED_BY.values()
        }
        found.append({"rate": rate, **means})
    return found


def choose_rates(tuning):
    """The rates of the lowest NLL and of the fewest greedy errors."""

    def value(row, by):  # what collapsed may be no number
        return np.nan_to_num(row[by], nan=np.inf)

    if not tuning:
        return dict.fromkeys(TUNED_BY.values())
    return {
        by: min(tuning, key=lambda row, by=by: value(row, by))["rate"]
        for by in TUNED_BY.values()
    }


def measure(runs, setting, method):
    """A method on test words.

    Args:
        runs: A `Runs`.
        setting: A name of the grid.
        method: A name of its methods, or a reference.

    Returns:
        A dictionary: these names, "tuning", "rates" by what chose them, the
        "scores" of each seed, and "iterations": mean gap and order where the
        order follows the gap.
    """
    tuning = tune(runs, setting, method)
    rates = choose_rates(tuning)
    results = {
        by: [
            runs.get(setting, method, rate, seed)
            for seed in range(runs.settings["seeds"])
        ]
        for by, rate in rates.items()
    }
    iterations = zip(
        *(each["iterations"] for each in results["nll"]), strict=True
    )
    return {
        "setting": setting,
        "method": method,
        "tuning": tuning,
        "rates": rates,
        "scores": {
            score: np.array([each["test"][score] for each in results[by]])
            for score, by in TUNED_BY.items()
        },
        "iterations": [
            {
                key: float(np.mean([each[key] for each in seeds]))
                for key in ("gap", "order")
            }
            for seeds in iterations
        ],
    }


def difference(ours, theirs):
    """Of paired scores, with an interval by Student's t over the seeds.

    Seeds have no words in common, so the interval is also over words.

    Args:
        ours: Scores, shape `(seeds,)`.
        theirs: Those of the control.
    """
    each = np.asarray(ours) - np.asarray(theirs)
    mean = each.mean()
    error = each.std(ddof=1) / len(each) ** 0.5
    reach = scipy.stats.t.ppf(0.975, len(each) - 1) * error
    return Difference(*map(float, (mean, mean - reach, mean + reach)))


def standard_error(scores):
    """Of the mean over seeds."""
    return float(np.std(scores, ddof=1) / len(scores) ** 0.5)


def compare(runs, setting, methods):
    """What `measure` gives of methods, with "differences" from the control."""
    control = measure(runs, setting, CONTROL)["scores"]
    found = []
    for method in methods:
        each = measure(runs, setting, method)
        differences = {
            score: difference(values, control[score])
            for score, values in each["scores"].items()
        }
        is_control = method == CONTROL
        found.append(each | {"differences": {} if is_control else differences})
    return found


def is_reference(found):
    """Whether it is the control or where it starts from, or SFT on more."""
    return found["method"] in (CONTROL, START, ALL)


def count(compared):
    """How many comparisons with the control exclude zero, by score."""
    rows = []
    for score, is_higher in IS_HIGHER_BETTER.items():
        found = [
            each["differences"][score]
            for each in compared
            if not is_reference(each)
        ]
        sure = [each for each in found if each.excludes_zero]
        better = sum((each.mean > 0) == is_higher for each in sure)
        rows.append(
            {
                "score": score,
                "comparisons": len(found),
                "better": better,
                "worse": len(sure) - better,
            }
        )
    return rows


def make_row(found):
    """A row of the table; error rates and accuracies in percent."""

    def text(score):
        scale, digits = _format(score)
        values = found["scores"][score] * scale
        error = standard_error(values)
        return f"{values.mean():.{digits}f} ± {error:.{digits}f}"

    def difference_text(score):
        if not found["differences"]:
            return ""
        scale, digits = _format(score)
        each = found["differences"][score]
        mean, low, high = (f"{scale * x:+.{digits}f}" for x in each)
        return f"{mean} ({low}, {high})" + " *" * each.excludes_zero

    rates = [rate for rate in found["rates"].values() if rate is not None]
    return {
        "setting": found["setting"],
        "method": found["method"],
        "rates": ", ".join(f"{rate:g}" for rate in rates),
        "NLL": text("nll"),
        "NLL - control": difference_text("nll"),
        "errors %": text("per greedy"),
        "errors - control": difference_text("per greedy"),
        "right %": text("acc greedy"),
        "sampled: errors %": text("per sampled"),
        "sampled: right %": text("acc sampled"),
    }


def _format(score):
    """A factor, and digits after the point."""
    return (1, 3) if score == "nll" else (100, 1)


def to_lists(compared):
    """What was compared, for a record."""
    return [
        each
        | {
            "scores": {s: v.tolist() for s, v in each["scores"].items()},
            "differences": {
                score: list(value)
                for score, value in each["differences"].items()
            },
        }
        for each in compared
    ]
