"""Which prompts are answered together, and at which padded length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np

from keras_iris.generation.engine import Prompts

# Prompt lengths of the compiled shapes unless the caller has better ones.
# The padding of a bucket costs prefill, memory and attention, but no decoding
# steps. Powers of two, and half-way where the prompts of chats mostly are.
_POWERS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DEFAULT_BUCKET_LENGTHS = tuple(sorted((*_POWERS, 192, 384)))

# So many prompts to a row are answered together, whatever their lengths.
_FEWEST_WAVES = 4


@dataclass(frozen=True)
class Batch:
    """A queue of prompts for the rows of a batch.

    Attributes:
        indices: Which prompts, by descending length.
        bucket_length: The length that they are padded to, in tokens.
        num_rows: Prompts that are answered at a time.
    """

    indices: tuple[int, ...]
    bucket_length: int
    num_rows: int


def plan_prompts(
    lengths: Sequence[int], num_rows: Mapping[int, int], waves: int = 1
) -> list[Batch]:
    """Sorts prompts by length, the longest first, and cuts them into batches.

    Where prompts wait for rows, those of a batch are longer than half its
    longest, as padding costs memory and attention; but not few, as some rows
    are idle at its end. Depends on nothing but its arguments; prompts of one
    length keep their order.

    Args:
        lengths: The length of each prompt in tokens, at most the last of the
            bucket lengths.
        num_rows: Rows of a batch by bucket length. Those lengths increase.
        waves: Prompts to a row, at most.

    Returns:
        Batches in the order in which they are answered.
    """
    sizes = np.asarray(lengths, "int64")
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]
    batches, start = [], 0
    while start < len(order):
        bucket = min(b for b in num_rows if b >= sizes[start])
        rows = num_rows[bucket]
        count = int(np.count_nonzero(sizes[start:] > sizes[start] // 2))
        count = min(max(count, min(waves, _FEWEST_WAVES) * rows), waves * rows)
        indices = tuple(order[start : start + count].tolist())
        batches.append(Batch(indices, bucket, rows))
        start += len(indices)
    return batches


def pad_prompts(
    prompts: Prompts, batch: Batch, *, pad_token_id: int, waves: int
) -> dict[str, np.ndarray]:
    """One batch as arrays of a fixed shape.

    Args:
        prompts: All prompts.
        batch: Those to take. Copies of the last one, which is the shortest,
            fill up the queue and aren't active.
        pad_token_id: Written behind the prompts.
        waves: Places of the queue to a row.

    Returns:
        `prompts` int32 of shape `(waves * num_rows, bucket_length)`, `lengths`
        int32 and `is_active` bool, both of shape `(waves * num_rows,)`.
    """
    size, num_prompts = waves * batch.num_rows, len(batch.indices)
    copies = batch.indices[-1:] * (size - num_prompts)
    rows = [prompts[i] for i in batch.indices + copies]
    return {
        "prompts": keras.utils.pad_sequences(
            rows, batch.bucket_length, padding="post", value=pad_token_id
        ),
        "lengths": np.array([len(row) for row in rows], "int32"),
        "is_active": np.arange(size) < num_prompts,
    }
