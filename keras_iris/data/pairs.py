"""Padded batches of (annotated, synthetic) response pairs."""

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
from numpy.typing import NDArray

from keras_iris.arguments import check_count
from keras_iris.data.buckets import (
    check_bucket_lengths,
    choose_bucket_lengths,
    plan_batches,
)
from keras_iris.data.example import (
    Example,
    TokenIds,
    check_ids,
    check_vocabulary,
)

Inputs: TypeAlias = dict[str, NDArray[Any]]
Batch: TypeAlias = tuple[Inputs, NDArray[np.float32], NDArray[np.float32]]


def pad_pairs(
    examples: Sequence[Example],
    synthetic: Sequence[TokenIds] | None,
    length: int,
    pad_token_id: int = 0,
    *,
    proto_synthetic: Sequence[TokenIds] | None = None,
) -> Inputs:
    """Pads pairs on the right into the inputs of a `SelfPlayModel`.

    Args:
        examples: Prompts with their annotated responses.
        synthetic: The synthetic response ids of each example, with the end
            token if there is one; `None` for annotated ones alone.
        length: Number of tokens of every row.
        pad_token_id: The id of the padding.
        proto_synthetic: The first policy's response ids of each example, for
            `keras_iris.losses.TSPIN`.

    Returns:
        `{"token_ids": int32, "padding_mask": bool, "response_mask": bool}`,
        each of shape `(len(examples), 2, length)`. Index 0 of axis 1 is the
        annotated, 1 the synthetic, and where it is given, 2 the
        proto-synthetic response. The padding mask is 1 where there is a token,
        the response mask where that token is of the response.

    Raises:
        ValueError: If a pair is longer than `length`, or the numbers of
            examples and responses differ.
    """
    others = [r for r in (synthetic, proto_synthetic) if r is not None]
    for responses in others:
        _check_number(examples, responses)
    shape = (len(examples), 1 + len(others), length)
    token_ids = np.full(shape, pad_token_id, np.int32)
    padding_mask = np.zeros(shape, bool)
    response_mask = np.zeros(shape, bool)
    for row, example in enumerate(examples):
        start = len(example.prompt_ids)
        responses = (example.response_ids, *(other[row] for other in others))
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
    opponent's log-probs of shape `(batch_size, 2)`, or `(batch_size, 3)` with
    proto-synthetic responses (nats; zeros if not given),
    `sample_weight` of shape `(batch_size,)`. All batches have `batch_size`
    rows; the incomplete one is filled with copies of its first row, of weight
    0. The order is a function of `seed` and `epoch` alone.

    With `num_samples` = k synthetic responses to a prompt each makes a pair
    with the annotated one, and the k pairs of an example are always in one
    batch. That is exact: in a mean over pairs of equal weight, tilted or not,
    an annotated response that is there k times counts as it does once.

    `SelfPlayModel.fit` sets `epoch` to the epoch that Keras counts, so that
    each has its own order, also where training is taken up again. Validation
    data and those of `evaluate` have the batches of epoch 0 every time, and
    `predict` gives its rows in the order of the synthetic responses.

    Args:
        examples: Prompts with their annotated responses.
        synthetic: The ids of the synthetic responses, `num_samples` of the
            first example, then those of the next. `None` for annotated
            responses alone, which `predict` scores and no loss takes.
        opponent_log_probs: The opponent's log-probs in nats, of shape
            `(len(synthetic), 2)`: annotated, synthetic; and proto-synthetic,
            where there are such responses.
        batch_size: Number of pairs in a batch, a multiple of `num_samples`:
            there are `batch_size / num_samples` prompts in it.
        num_samples: Synthetic responses to each prompt.
        proto_synthetic: The ids of as many responses of the first policy, for
            `keras_iris.losses.TSPIN`.
        pad_token_id: The id of the padding.
        bucket_lengths: The sequence lengths that batches may have, in tokens.
            Defaults to at most four, from the quartiles of the data.
        shuffle: Whether to shuffle. If not, examples are sorted by length.
        seed: Of the shuffling.
        epoch: The epoch whose order is in force.

    Raises:
        ValueError: If there are fewer pairs than `batch_size`, which isn't a
            multiple of `num_samples`, the arguments are of different lengths,
            a prompt or response is empty, a row is too long or a log-prob
            isn't finite.
    """

    def __init__(  # noqa: PLR0913
        self,
        examples: Sequence[Example],
        synthetic: Sequence[TokenIds] | None,
        opponent_log_probs: NDArray[np.floating[Any]] | None = None,
        *,
        batch_size: int,
        num_samples: int = 1,
        proto_synthetic: Sequence[TokenIds] | None = None,
        pad_token_id: int = 0,
        bucket_lengths: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epoch: int = 0,
    ):
        super().__init__()
        check_batch_size(batch_size, num_samples)
        self._num_pairs = len(examples) * num_samples
        check_one_batch(self._num_pairs, batch_size)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.pad_token_id = pad_token_id
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = epoch
        self.examples = examples
        self.synthetic = () if synthetic is None else synthetic
        self._proto_synthetic = proto_synthetic
        generated = [r for r in (synthetic, proto_synthetic) if r is not None]
        for ids in generated:
            _check_number(examples, ids, num_samples)
        self.num_responses = 1 + len(generated)
        self._log_probs = _check_log_probs(
            opponent_log_probs, (self._num_pairs, self.num_responses)
        )
        # Of an example, with the longest of its responses.
        prompt = _lengths([e.prompt_ids for e in examples], "prompt")
        real = _lengths([e.response_ids for e in examples], "response")
        longest = real
        for ids in generated:
            fake = _lengths(ids, "synthetic response", num_samples)
            fake = fake.reshape(-1, num_samples).max(axis=1)
            longest = np.maximum(longest, fake)
        self._lengths = prompt + longest
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
        return -(-self._num_pairs // self.batch_size)

    def __getitem__(self, batch_index: int) -> Batch:
        """The batch `(x, y, sample_weight)`."""
        indices = self.indices(batch_index)
        pairs = np.where(indices < 0, indices[0], indices)
        examples = pairs // self.num_samples
        proto, is_alone = self._proto_synthetic, self.num_responses == 1
        x = pad_pairs(
            [self.examples[i] for i in examples],
            None if is_alone else [self.synthetic[i] for i in pairs],
            self._length(indices),
            self.pad_token_id,
            proto_synthetic=proto and [proto[i] for i in pairs],
        )
        return x, self._log_probs[pairs], (indices >= 0).astype(np.float32)

    def indices(self, batch_index: int) -> NDArray[np.int64]:
        """The number of the pair in each row of a batch.

        Args:
            batch_index: From 0 to `len(self) - 1`.

        Returns:
            int64 of shape `(batch_size,)`: the pair of `synthetic[i]`, which is
            of example `i // num_samples`, has number i; -1 for the rows that
            fill up the incomplete batch.
        """
        return self._batches()[batch_index]

    @property
    def sequence_lengths(self) -> frozenset[int]:
        """Lengths of the epoch's batches, in tokens."""
        return frozenset(map(self._length, self._batches()))

    def check_vocabulary(self, vocabulary_size: int) -> None:
        """Refuses token ids that a model doesn't have.

        Args:
            vocabulary_size: Number of ids of the model.

        Raises:
            ValueError: If an id is negative, or not below `vocabulary_size`.
        """
        check_vocabulary(self.examples, vocabulary_size)
        for responses in (self.synthetic, self._proto_synthetic or ()):
            for row, token_ids in enumerate(responses):
                name = f"synthetic response {row}"
                check_ids(name, np.asarray(token_ids), vocabulary_size)

    def _length(self, indices: NDArray[np.int64]) -> int:
        examples = indices[indices >= 0] // self.num_samples
        longest = self._lengths[examples].max()
        return next(b for b in self.bucket_lengths if b >= longest)

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
            examples = plan_batches(
                self._lengths,
                self.batch_size // self.num_samples,
                generator if self.shuffle else None,
            )
            places = np.arange(self.num_samples)
            pairs = examples[..., None] * self.num_samples + places
            self._plan = pairs.reshape(len(examples), -1).clip(-1)
            self._planned_epoch = epoch
        return self._plan


def check_batch_size(batch_size: int, num_samples: int) -> None:
    """Refuses batches of pairs that would part those of an example."""
    check_count("batch_size", batch_size)
    check_count("num_samples", num_samples)
    if batch_size % num_samples:
        raise ValueError(
            f"Expected `batch_size` to be a multiple of num_samples="
            f"{num_samples}, as it counts pairs and those of a prompt stay "
            f"together. Received: {batch_size}"
        )


def check_one_batch(num_pairs: int, batch_size: int) -> None:
    """Refuses data without a full batch, over which the loss is defined."""
    if num_pairs < batch_size:
        raise ValueError(
            f"The data make {num_pairs} pairs, fewer than batch_size="
            f"{batch_size}. Lower `batch_size` or add rows."
        )


def _lengths(
    rows: Sequence[TokenIds], name: str, num_samples: int = 1
) -> NDArray[np.int64]:
    """Tokens of each row, `num_samples` of which are an example's."""
    lengths = np.asarray([len(row) for row in rows], np.int64)
    empty = np.flatnonzero(lengths == 0)
    if len(empty):
        raise ValueError(
            f"The {name} of example {empty[0] // num_samples} is empty "
            f"({len(empty)} such responses or prompts). Expected at least one "
            "token."
        )
    return lengths


def _check_number(
    examples: Sequence[Example],
    synthetic: Sequence[TokenIds],
    num_samples: int = 1,
) -> None:
    if len(examples) * num_samples != len(synthetic):
        raise ValueError(
            f"Received {len(examples)} examples and {len(synthetic)} "
            f"synthetic responses, expected {num_samples} for each example."
        )


def _check_log_probs(
    log_probs: NDArray[np.floating[Any]] | None, shape: tuple[int, int]
) -> NDArray[np.float32]:
    if log_probs is None:
        return np.zeros(shape, np.float32)
    values = np.asarray(log_probs, np.float32)
    if values.shape != shape:
        raise ValueError(
            f"Expected `opponent_log_probs` of shape {shape}, received "
            f"{values.shape}."
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
