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


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered together.

    Attributes:
        indices: Which prompts, by descending length.
        bucket_length: The length that they are padded to, in tokens.
        num_rows: As many as `indices`; more in the last batch only.
    """

    indices: tuple[int, ...]
    bucket_length: int
    num_rows: int


def plan_prompts(
    lengths: Sequence[int], num_rows: Mapping[int, int]
) -> list[Batch]:
    """Sorts prompts by length, the longest first, and cuts them into batches.

    Depends on nothing but its arguments; prompts of one length keep their
    order.

    Args:
        lengths: The length of each prompt in tokens, at most the last of the
            bucket lengths.
        num_rows: Rows of a batch by bucket length. Those lengths increase.

    Returns:
        Batches in the order in which they are answered.
    """
    order = np.argsort(-np.asarray(lengths, "int64"), kind="stable").tolist()
    batches, start = [], 0
    while start < len(order):
        bucket = min(b for b in num_rows if b >= lengths[order[start]])
        indices = tuple(order[start : start + num_rows[bucket]])
        batches.append(Batch(indices, bucket, num_rows[bucket]))
        start += len(indices)
    return batches


def pad_prompts(
    prompts: Prompts, batch: Batch, *, pad_token_id: int, pads_left: bool
) -> dict[str, np.ndarray]:
    """One batch as arrays of a fixed shape.

    Args:
        prompts: All prompts.
        batch: Those to take. Rows without a prompt repeat the last one, which
            is the shortest, and are not real.
        pad_token_id: Written where a row has no prompt.
        pads_left: Whether the prompts end together, instead of beginning so.

    Returns:
        `token_ids` int32 and `is_prompt` bool of shape
        `(num_rows, bucket_length)`; `starts` int32, where an answer begins,
        and `is_real` bool, both of shape `(num_rows,)`.
    """
    time, num_real = batch.bucket_length, len(batch.indices)
    dummies = batch.indices[-1:] * (batch.num_rows - num_real)
    rows = [prompts[i] for i in batch.indices + dummies]
    lengths = np.array([len(row) for row in rows], "int32")
    starts = np.full_like(lengths, time) if pads_left else lengths
    positions, ends = np.arange(time), starts[:, None]
    firsts = ends - lengths[:, None]
    return {
        "token_ids": keras.utils.pad_sequences(
            rows,
            time,
            padding="pre" if pads_left else "post",
            value=pad_token_id,
        ),
        "is_prompt": (firsts <= positions) & (positions < ends),
        "starts": starts,
        "is_real": np.arange(batch.num_rows) < num_real,
    }
