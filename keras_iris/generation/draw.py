"""Drawing ids by noise that is given."""

import math
from typing import Any

import numpy as np
from keras import ops
from numpy.typing import NDArray

# Random numbers that one draw takes.
NUMBERS = 2


def make_noise(seed: int, place: int, num_draws: int) -> NDArray[np.float32]:
    """The noise of one prompt, the same in every batch and on every backend.

    Args:
        seed: Non-negative.
        place: Of the prompt among all prompts.
        num_draws: Draws that it is for.

    Returns:
        Uniform numbers in [0, 1), of shape `(NUMBERS * num_draws,)`.
    """
    generator = np.random.default_rng((seed, place))
    return generator.random(NUMBERS * num_draws, "float32")


def draw(probabilities: Any, noise: Any) -> Any:
    """Draws an id for each row, by inversion of the distribution function.

    First one of about `sqrt(vocabulary)` groups of ids, then an id of it, each
    by a number of its own: sums over the vocabulary would round away the tail.

    Args:
        probabilities: Float32 tensor of shape `(batch, vocabulary)`.
        noise: Uniform numbers in [0, 1), of shape `(batch, NUMBERS)`.

    Returns:
        Int32 tensor of shape `(batch,)`.
    """
    size = probabilities.shape[1]
    width = math.isqrt(size - 1) + 1
    widths = ((0, 0), (0, -size % width))
    groups = ops.reshape(
        ops.pad(probabilities, widths), (probabilities.shape[0], -1, width)
    )
    group = _pick(ops.sum(groups, axis=-1), noise[:, 0])
    members = ops.take_along_axis(groups, group[:, None, None], axis=1)
    return group * width + _pick(members[:, 0], noise[:, 1])


def _pick(weights: Any, noise: Any) -> Any:
    """A column for each row, as probable as its weight is of the row's sum.

    Args:
        weights: Of shape `(batch, columns)`.
        noise: Of shape `(batch,)`.

    Returns:
        Int32 tensor of shape `(batch,)`.
    """
    sums = ops.cumsum(weights, axis=-1)
    # A sum in another order can be larger by rounding alone.
    hits = ops.logical_and(sums > noise[:, None] * sums[:, -1:], weights > 0)
    # The first hit; where rounding has left none, the most probable column.
    order = ops.arange(weights.shape[1], 0, -1, dtype="float32")
    ranks = ops.where(
        hits, order + ops.max(weights, -1, keepdims=True), weights
    )
    return ops.cast(ops.argmax(ranks, axis=-1), "int32")
