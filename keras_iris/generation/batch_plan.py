"""Which prompts are answered together, and at which padded length."""

from collections.abc import Sequence
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
        indices: Which prompts, by ascending length. Fewer than the batch size
            in the last batch only.
        bucket_length: The length that they are padded to, in tokens.
    """

    indices: tuple[int, ...]
    bucket_length: int


def plan_prompts(
    lengths: Sequence[int], *, batch_size: int, bucket_lengths: Sequence[int]
) -> list[Batch]:
    """Sorts prompts by length and cuts them into batches.

    Depends on nothing but its arguments; prompts of one length keep their
    order.

    Args:
        lengths: The length of each prompt in tokens, at most the last of
            `bucket_lengths`.
        batch_size: Rows in each batch but the last, which may have fewer.
        bucket_lengths: Increasing lengths.

    Returns:
        Batches in the order in which they are answered.
    """
    order = np.argsort(np.asarray(lengths, "int64"), kind="stable")
    batches = []
    for start in range(0, len(order), batch_size):
        indices = tuple(int(i) for i in order[start : start + batch_size])
        longest = lengths[indices[-1]]
        bucket = min(b for b in bucket_lengths if b >= longest)
        batches.append(Batch(indices, bucket))
    return batches


def pad_prompts(
    prompts: Prompts,
    batch: Batch,
    *,
    batch_size: int,
    pad_token_id: int,
    pads_left: bool,
) -> dict[str, np.ndarray]:
    """One batch as arrays of a fixed shape.

    Args:
        prompts: All prompts.
        batch: Those to take.
        batch_size: Rows to make. Rows without a prompt repeat the first one,
            which is the shortest, and are not real.
        pad_token_id: Written where a row has no prompt.
        pads_left: Whether the prompts end together, instead of beginning so.

    Returns:
        `token_ids` int32 and `is_prompt` bool of shape
        `(batch_size, bucket_length)`; `starts` int32, where an answer begins,
        and `is_real` bool, both of shape `(batch_size,)`.
    """
    time, num_real = batch.bucket_length, len(batch.indices)
    dummies = batch.indices[:1] * (batch_size - num_real)
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
        "is_real": np.arange(batch_size) < num_real,
    }
