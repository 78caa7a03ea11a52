"""Padded batches of (annotated, synthetic) response pairs."""

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from keras_iris.data.buckets import (
    check_bucket_lengths,
    choose_bucket_lengths,
    plan_batches,
)
from keras_iris.data.example import Example, TokenIds

Inputs: TypeAlias = dict[str, NDArray[Any]]
Batch: TypeAlias = tuple[Inputs, NDArray[np.float32], NDArray[np.float32]]


def pad_pairs(
    examples: Sequence[Example],
    synthetic: Sequence[TokenIds],
    length: int,
    pad_token_id: int = 0,
) -> Inputs:
    """Pads pairs on the right into the inputs of a `SelfPlayModel`.

    Args:
        examples: Prompts with their annotated responses.
        synthetic: The synthetic response ids of each example, with the end
            token if there is one.
        length: Number of tokens of every row.
        pad_token_id: The id of the padding.

    Returns:
        `{"token_ids": int32, "padding_mask": bool, "response_mask": bool}`,
        each of shape `(len(examples), 2, length)`. Index 0 of axis 1 is the
        annotated, 1 the synthetic response. The padding mask is 1 where there
        is a token, the response mask where that token is of the response.

    Raises:
        ValueError: If a pair is longer than `length`, or the numbers of
            examples and responses differ.
    """
    _check_same_number(examples, synthetic)
    shape = (len(examples), 2, length)
    token_ids = np.full(shape, pad_token_id, np.int32)
    padding_mask = np.zeros(shape, bool)
    response_mask = np.zeros(shape, bool)
    for row, example in enumerate(examples):
        start = len(example.prompt_ids)
        responses = (example.response_ids, synthetic[row])
        for column, response in enumerate(responses):
            end = start + len(response)
            if end > length:
                raise ValueError(
                    f"Pair {row} has {end} tokens, expected at most "
                    f"`length` = {length}."
                )
            token_ids[row, column, :start] = example.prompt_ids
            token_ids[row, column, start:end] = response
            padding_mask[row, column, :end] = True
            response_mask[row, column, start:end] = True
    return {
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "response_mask": response_mask,
    }


class PairDataset(keras.utils.PyDataset):
    """Length-bucketed batches of pairs, for `fit`, `evaluate` and `predict`.

    Yields `(x, y, sample_weight)`: `x` as `pad_pairs` makes it, `y` the
    opponent's log-probs of shape `(batch_size, 2)` (nats; zeros if not given),
    `sample_weight` of shape `(batch_size,)`. All batches have `batch_size`
    rows; the incomplete one is filled with copies of its first row, of weight
    0. The order is a function of `seed` and `epoch` alone.

    `SelfPlayModel.fit` sets `epoch` to the epoch that Keras counts, so that
    each has its own order, also where training is taken up again. Validation
    data and those of `evaluate` have the batches of epoch 0 every time, and
    `predict` gives its rows in the order of the examples.

    Args:
        examples: Prompts with their annotated responses.
        synthetic: The synthetic response ids of each example.
        opponent_log_probs: The opponent's log-probs in nats, of shape
            `(num_examples, 2)`: annotated, synthetic.
        batch_size: Number of pairs in a batch.
        pad_token_id: The id of the padding.
        bucket_lengths: The sequence lengths that batches may have, in tokens.
            Defaults to at most four, from the quartiles of the data.
        shuffle: Whether to shuffle. If not, rows are sorted by length.
        seed: Of the shuffling.
        epoch: The epoch whose order is in force.

    Raises:
        ValueError: If there are fewer examples than `batch_size`, the
            arguments are of different lengths, a prompt or response is empty,
            a row is too long or a log-prob isn't finite.
    """

    def __init__(  # noqa: PLR0913
        self,
        examples: Sequence[Example],
        synthetic: Sequence[TokenIds],
        opponent_log_probs: NDArray[np.floating[Any]] | None = None,
        *,
        batch_size: int,
        pad_token_id: int = 0,
        bucket_lengths: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ):
        super().__init__()
        _check_same_number(examples, synthetic)
        _check_batch_size(batch_size, len(examples))
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self._prompts = _Ragged([e.prompt_ids for e in examples], "prompt")
        self._real = _Ragged([e.response_ids for e in examples], "response")
        self._synthetic = _Ragged(synthetic, "synthetic response")
        self._log_probs = _check_log_probs(opponent_log_probs, len(examples))
        self._lengths = self._prompts.lengths + np.maximum(
            self._real.lengths, self._synthetic.lengths
        )
        if bucket_lengths is None:
            self.bucket_lengths = choose_bucket_lengths(self._lengths)
        else:
            self.bucket_lengths = check_bucket_lengths(
                bucket_lengths, int(self._lengths.max())
            )
        self._planned_epoch: int | None = None
        self._plan = self._batches()

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._lengths) // self.batch_size)

    def __getitem__(self, batch_index: int) -> Batch:
        """The batch `(x, y, sample_weight)`."""
        indices = self.indices(batch_index)
        rows = np.where(indices < 0, indices[0], indices)
        x = pad_pairs(
            [Example(self._prompts[i], self._real[i]) for i in rows],
            [self._synthetic[i] for i in rows],
            self._bucket_length(rows),
            self.pad_token_id,
        )
        return x, self._log_probs[rows], (indices >= 0).astype(np.float32)

    def indices(self, batch_index: int) -> NDArray[np.int64]:
        """The example index of each row of a batch.

        Args:
            batch_index: From 0 to `len(self) - 1`.

        Returns:
            int64 of shape `(batch_size,)`, -1 for the rows that fill up the
            incomplete batch.
        """
        return self._batches()[batch_index]

    def at_epoch(self, epoch: int) -> "PairDataset":
        """The same data in the order of an epoch that nothing changes.

        Args:
            epoch: Number of the epoch, from 0.
        """
        dataset = copy.copy(self)
        dataset.epoch = epoch
        return dataset

    def _batches(self) -> NDArray[np.int64]:
        epoch = self.epoch if self.shuffle else 0
        if epoch != self._planned_epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._plan = plan_batches(
                self._lengths,
                self.batch_size,
                generator if self.shuffle else None,
            )
            self._planned_epoch = epoch
        return self._plan

    def _bucket_length(self, rows: NDArray[np.int64]) -> int:
        longest = int(self._lengths[rows].max())
        return next(b for b in self.bucket_lengths if b >= longest)


class _Ragged:
    """Rows of token ids in one flat array, which keeps memory small."""

    def __init__(self, rows: Sequence[TokenIds], name: str):
        self.lengths = np.asarray([len(row) for row in rows], np.int64)
        empty = np.flatnonzero(self.lengths == 0)
        if len(empty):
            raise ValueError(
                f"The {name} of example {empty[0]} is empty ({len(empty)} "
                "such examples). Expected at least one token."
            )
        self._ids = np.concatenate([np.asarray(r, np.int32) for r in rows])
        self._ends = np.cumsum(self.lengths)

    def __getitem__(self, index: int) -> TokenIds:
        end = self._ends[index]
        return self._ids[end - self.lengths[index] : end]


def _check_same_number(
    examples: Sequence[Example], synthetic: Sequence[TokenIds]
) -> None:
    if len(examples) != len(synthetic):
        raise ValueError(
            f"Received {len(examples)} examples and {len(synthetic)} "
            "synthetic responses, expected one response for each example."
        )


def _check_batch_size(batch_size: int, num_examples: int) -> None:
    if batch_size < 1:
        raise ValueError(
            f"Expected `batch_size` of at least 1, received {batch_size}."
        )
    if num_examples < batch_size:
        raise ValueError(
            f"The data has {num_examples} rows, fewer than `batch_size` = "
            f"{batch_size}. Expected at least one full batch, because the "
            "objective is defined over a batch. Use a smaller `batch_size` "
            "or more data."
        )


def _check_log_probs(
    log_probs: NDArray[np.floating[Any]] | None, num_examples: int
) -> NDArray[np.float32]:
    if log_probs is None:
        return np.zeros((num_examples, 2), np.float32)
    values = np.asarray(log_probs, np.float32)
    if values.shape != (num_examples, 2):
        raise ValueError(
            f"Expected `opponent_log_probs` of shape ({num_examples}, 2), "
            f"received {values.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`opponent_log_probs` has NaN or infinite values in {len(bad)} "
            f"rows, first in {bad[:10].tolist()}; expected finite nats. Score "
            "again with the checkpoint the responses were sampled from, in a "
            "wider dtype if it was float16."
        )
    return values
