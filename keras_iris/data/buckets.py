"""Which sequence lengths batches have, and which rows go together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_BUCKETS = 4
WINDOW_BATCHES = 32  # rows are sorted by length within so many batches
FINE_STEP, COARSE_STEP, COARSE_FROM = 8, 64, 256  # in tokens


def next_power_of_two(number: int) -> int:
    """The least power of two that isn't below a positive number."""
    return 1 << (number - 1).bit_length()


def choose_bucket_lengths(
    lengths: NDArray[np.int64], longest: int = 0
) -> tuple[int, ...]:
    """Four lengths, or fewer, that waste little padding.

    The quartiles of the lengths, rounded up to a multiple of 8 tokens, from
    256 tokens on of 64.

    Args:
        lengths: Lengths in tokens, of shape `(num_rows,)`.
        longest: Another length that rows may have; a fifth, if it has to be.

    Returns:
        Increasing lengths; none of `lengths` is above the last.
    """
    levels = np.linspace(0, 1, NUM_BUCKETS + 1)[1:]
    quantiles = np.quantile(lengths, levels, method="higher")
    chosen = {_round_up(int(length)) for length in (*quantiles, longest)}
    return tuple(sorted(chosen - {0}))


def check_bucket_lengths(
    bucket_lengths: Sequence[int], longest: int = 0
) -> tuple[int, ...]:
    """Returns the bucket lengths as a tuple, if they can be used.

    Raises:
        ValueError: If they don't increase, or a row is longer than the last.
    """
    buckets = tuple(int(length) for length in bucket_lengths)
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(
            "Expected `bucket_lengths` to be increasing positive numbers, "
            f"received {buckets}."
        )
    if longest > buckets[-1]:
        raise ValueError(
            f"The longest row has {longest} tokens, expected at most "
            f"{buckets[-1]}, the last of `bucket_lengths`. Add a longer "
            "bucket, or tokenise with shorter maximum lengths."
        )
    return buckets


def plan_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    generator: np.random.Generator | None,
) -> NDArray[np.int64]:
    """Puts rows of similar length together.

    Args:
        lengths: Lengths in tokens, of shape `(num_rows,)`.
        batch_size: Rows in each batch.
        generator: Shuffles the rows, then the batches. `None` sorts all rows
            by length.

    Returns:
        Row indices of shape `(num_batches, batch_size)`, -1 where the one
        incomplete batch has no row.
    """
    if generator is None:
        order = np.argsort(lengths, kind="stable")
    else:
        shuffled = generator.permutation(len(lengths))
        window = WINDOW_BATCHES * batch_size
        order = np.concatenate(
            [
                rows[np.argsort(lengths[rows], kind="stable")]
                for rows in np.split(
                    shuffled, range(window, len(shuffled), window)
                )
            ]
        )
    num_missing = -len(order) % batch_size
    order = np.concatenate([order, np.full(num_missing, -1, order.dtype)])
    batches = order.reshape(-1, batch_size).astype(np.int64)
    return batches if generator is None else generator.permutation(batches)


def _round_up(length: int) -> int:
    step = FINE_STEP if length < COARSE_FROM else COARSE_STEP
    return -(-length // step) * step
