"""How the scores of two runs compare at the end."""

import math
from dataclasses import dataclass

from keras_iris.evaluation.run_record import RunRecord

# Values that differ by less, relative to the other, are called level.
LEVEL = 0.01
_HIGHER_IS_BETTER = ("accuracy", "margin")
_LOWER_IS_BETTER = ("nll", "error", "perplexity", "loss")


def direction(score: str) -> str:
    """Says which way a score is better: `higher`, `lower` or `""`.

    It goes by the name; of a name that says nothing, no verdict is given.
    """
    if any(word in score.lower() for word in _HIGHER_IS_BETTER):
        return "higher"
    if any(word in score.lower() for word in _LOWER_IS_BETTER):
        return "lower"
    return ""


@dataclass(frozen=True)
class Outcome:
    """A score at the end of a run, and what it is compared with."""

    score: str
    iteration: int
    value: float
    reference: float

    @property
    def difference(self) -> float:
        """The run's value minus the other."""
        return self.value - self.reference

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `level`, or without a direction how it moved."""
        difference = self.difference
        if not math.isfinite(difference):
            return "not comparable"
        if abs(difference) <= LEVEL * abs(self.reference):
            return "level"
        moved = "higher" if difference > 0 else "lower"
        if not direction(self.score):
            return moved
        return "better" if moved == direction(self.score) else "worse"


def compare(run: RunRecord, other: RunRecord) -> list[Outcome]:
    """The outcome of each score, at the last iteration of both."""
    outcomes = []
    for name in run.score_names():
        ours, theirs = run.scores(name), other.scores(name)
        common = ours.keys() & theirs.keys()
        last = max(common, default=0)
        if last > 0:
            outcomes.append(Outcome(name, last, ours[last], theirs[last]))
    return outcomes


def compare_with_start(run: RunRecord) -> list[Outcome]:
    """The outcome of each score against the run before self-play."""
    outcomes = []
    for name in run.score_names():
        scores = run.scores(name)
        last = max(scores)
        if last > 0 and 0 in scores:
            outcomes.append(Outcome(name, last, scores[last], scores[0]))
    return outcomes


def score_mode(name, modes=None):
    d = (modes or {}).get(name) or {"higher": "max", "lower": "min", "": None}[direction(name)]
    return d
