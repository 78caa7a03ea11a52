"""A score that remembers its examples."""

from typing import Any

import numpy as np


class ExampleScore(float):
    """A mean over examples, which knows what each of them gave.

    It is a number like any other; a report draws its intervals from the
    examples.

    Args:
        values: What each example gave, shape `(examples,)`: a loss, 1 for a
            right answer, or the errors in it.
        weights: What the sum of `values` is divided by, such as each example's
            tokens, of the same shape; by default 1 for each.

    Examples:
        >>> float(ExampleScore([2.0, 1.0], weights=[4, 2]))
        0.5
    """

    values: np.ndarray
    weights: np.ndarray

    def __new__(cls, values: Any, weights: Any = None) -> "ExampleScore":
        """A number with arrays; see the class."""
        values = np.asarray(values, "float64")
        if weights is None:
            weights = np.ones(values.shape)
        weights = np.asarray(weights, "float64")
        if values.ndim != 1 or values.shape != weights.shape or not len(values):
            raise ValueError(
                "A score has to be of one value and weight for each example. "
                f"Received: shapes {values.shape} and {weights.shape}"
            )
        score = super().__new__(cls, values.sum() / weights.sum())
        score.values, score.weights = values, weights
        return score


def interval_of_difference(
    ours: ExampleScore, theirs: ExampleScore, *, num_draws: int = 2000
) -> tuple[float, float]:
    """A 95% interval of the difference of two scores on the same examples.

    Examples are drawn with replacement, the same for both (a paired
    bootstrap), so what makes an example hard for both doesn't count. It says
    how the difference depends on the examples, not on the seed of training.

    Args:
        ours: A score.
        theirs: Another one, of the same examples.
        num_draws: How often all examples are drawn.

    Returns:
        The 2.5% and 97.5% quantiles of `ours - theirs`.
    """
    generator = np.random.default_rng(0)
    size = len(ours.values)
    differences = np.empty(num_draws)
    for i in range(num_draws):
        rows = generator.integers(0, size, size)
        differences[i] = (
            ours.values[rows].sum() / ours.weights[rows].sum()
            - theirs.values[rows].sum() / theirs.weights[rows].sum()
        )
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
