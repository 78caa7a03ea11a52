"""How far the model is from the data: the gap, in nats."""

from typing import Protocol, runtime_checkable

import numpy as np

from keras_iris.metrics import PairBatch


@runtime_checkable
class GapEstimator(Protocol):
    """Estimates the gap between the opponent and the data.

    An estimator with arguments tells `SelfPlay` what they are by a method
    `get_config`, so that a run doesn't go on with others.
    """

    def gap(self, pairs: PairBatch) -> float:
        """The gap in nats: 0 for none, larger for further apart."""
        ...


class RenyiGap:
    """A lower bound of the Rényi divergence of order 2, in nats.

    For any function `s` of a response, Hammersley, Chapman and Robbins bound
    the chi-squared divergence of the data from the opponent from below:

        chi2 >= d2 = (E_data s - E_opponent s)^2 / Var_opponent s
        D_2 = log(1 + chi2) >= log(1 + d2)

    Here `s` is the opponent's log-prob of a response divided by its number of
    tokens. The sampling noise of both means is taken off `d2`, so that its
    expectation is 0 where data and opponent are the same. It is the noise of
    independent responses, rather too much: what the responses to a prompt
    have in common cancels. Where the means of `s` meet the bound is 0, however
    responses differ in other ways, such as length.

    Reference:
        Chapman and Robbins, "Minimum variance estimation without regularity
        assumptions", 1951; IRIS, arXiv 2604.20933, for the divergence.
    """

    def gap(self, pairs: PairBatch) -> float:
        """The gap of pairs, 0 where there are fewer than two.

        Args:
            pairs: Of which log-probs of the opponent, tokens and weights are
                taken.
        """
        return gap_of_moments(pair_moments(pairs))


def pair_moments(pairs: PairBatch) -> np.ndarray:
    """What the gap needs to know of pairs.

    Args:
        pairs: Of which log-probs of the opponent, tokens and weights are
            taken.

    Returns:
        Float64 array of shape `(2, 4)`. For annotated and synthetic responses:
        the sum of their weights, where an annotated one that is in several
        pairs counts once, the mean of their log-probs per token, the sum of
        their squared deviations from it, and the sum of squared weights.
    """
    weight = np.asarray(pairs.sample_weight, "float64")[:, None]
    values = pairs.opponent / np.maximum(pairs.num_tokens, 1)
    total = weight.sum(axis=0)
    mean = (weight * values).sum(axis=0) / np.maximum(total, 1e-30)
    squares = (weight * (values - mean) ** 2).sum(axis=0)
    copies = np.array([pairs.num_samples, 1])
    square = (weight**2).sum(axis=0) / copies
    moments = [total / copies, mean, squares / copies, square]
    return np.stack(moments, axis=1).astype("float64")


def add_moments(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The moments of two sets of pairs together.

    Args:
        left: As `pair_moments` gives them, shape `(2, 4)`.
        right: The same.

    Reference:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm
        for computing sample variances", 1979.
    """
    left, right = np.asarray(left, "float64"), np.asarray(right, "float64")
    total = left[:, 0] + right[:, 0]
    share = right[:, 0] / np.maximum(total, 1e-30)
    distance = right[:, 1] - left[:, 1]
    mean = left[:, 1] + share * distance
    squares = left[:, 2] + right[:, 2] + distance**2 * left[:, 0] * share
    return np.stack([total, mean, squares, left[:, 3] + right[:, 3]], axis=1)


def gap_of_moments(moments: np.ndarray) -> float:
    """The gap of pairs with these moments, in nats: see `RenyiGap`.

    Args:
        moments: As `pair_moments` gives them, shape `(2, 4)`.
    """
    total, mean, squares, square = np.asarray(moments, "float64").T
    # As many of equal weight would leave the means the same noise.
    count = total**2 / np.maximum(square, 1e-300)
    if count.min() < 2:
        return 0.0
    variance = squares / (total - square / total)
    noise = np.sum(variance / count)
    excess = (mean[0] - mean[1]) ** 2 - noise
    # Where all synthetic responses are one, the bound is infinite.
    d2 = excess / max(variance[1], 1e-12)
    return float(np.log1p(max(d2, 0.0)))
