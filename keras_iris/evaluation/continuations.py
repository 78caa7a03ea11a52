"""Log-probs of continuations of contexts, many at a time."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.arguments import check_count
from keras_iris.data.buckets import next_power_of_two
from keras_iris.generation.cached_forward import RightAligned, right_aligned
from keras_iris.models.checks import check_causal_lm
from keras_iris.models.score import divisible_batch_size

Request: TypeAlias = tuple[list[int], list[int]]  # context, continuation
Score: TypeAlias = tuple[float, bool]

# Positions whose logits are held at a time.
_TILE = 256
_SHORTEST = 32
# Continuations that follow a context in one pass; a number is compiled.
_AT_ONCE = 4
# How many times as long as the tokens behind it a context has to be, for its
# keys and values to be kept.
_LONG = 2


class ContinuationScorer:
    """Scores continuations of contexts under a causal LM.

    What comes before the last token of a continuation is computed once for
    all requests that it is the beginning of: the letters of a multiple choice
    are one row of a batch. Where several longer continuations follow a
    context, as in HellaSwag, its keys and values are computed once for all of
    them (Llama, Mistral, Qwen). Rows are sorted by length and padded to a few
    lengths, so that few shapes are compiled.

    Args:
        causal_lm: As in `keras_iris.SelfPlayModel`.
        batch_size: Rows of a forward pass; as many more as it takes for the
            devices that share a batch to divide it.
        max_length: Tokens that the model reads at most.

    Raises:
        ValueError: If an argument can't be used.
    """

    def __init__(
        self, causal_lm: Any, *, batch_size: int, max_length: int
    ) -> None:
        check_causal_lm(causal_lm)
        self.batch_size = divisible_batch_size(
            check_count("batch_size", batch_size)
        )
        self.max_length = check_count("max_length", max_length, at_least=2)
        self._lengths = lengths_up_to(max_length)
        self._network = _Network(causal_lm)
        self._passes: Any = right_aligned(causal_lm)
        # TensorFlow would trace one with lengths that it doesn't know.
        self._contexts = functools.cache(
            lambda *shape: _Contexts(causal_lm, self._passes)
        )

    def __call__(
        self, requests: Sequence[Request]
    ) -> Iterator[dict[int, Score]]:
        """Scores requests, the longest first.

        Args:
            requests: Token ids of each context and continuation. A context
                that is too long loses its beginning.

        Yields:
            The scores of a batch, by the place of the request: the log-prob of
            the continuation, in nats, summed over its tokens, and whether
            each of them is the likeliest of the vocabulary.

        Raises:
            ValueError: If a context or continuation is empty, or a
                continuation longer than `max_length`.
        """
        rows = _share_rows([self._cut(*request) for request in requests])
        groups, rows = _share_contexts(rows, self._passes is not None)
        groups.sort(key=lambda group: len(group[0].context), reverse=True)
        for start in range(0, len(groups), self.batch_size):
            yield self._score_groups(groups[start : start + self.batch_size])
        rows.sort(key=lambda row: len(row.inputs), reverse=True)
        for start in range(0, len(rows), self.batch_size):
            yield self._score(rows[start : start + self.batch_size])

    def _cut(self, context: list[int], continuation: list[int]) -> Request:
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                "Expected a context and a continuation of 1 to "
                f"max_length={self.max_length} tokens, received "
                f"{len(context)} and {len(continuation)} tokens."
            )
        # The last token is predicted, and not read.
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def _score(self, rows: list["_Row"]) -> dict[int, Score]:
        time = self._padded(len(rows[0].inputs))
        most = _power_of_four(max(len(row.targets) for row in rows))
        size = self.batch_size
        x = {
            "token_ids": np.zeros((size, time), "int32"),
            "padding_mask": np.zeros((size, time), "int32"),
            "positions": np.zeros((size, most), "int32"),
            "targets": np.zeros((size, most), "int32"),
        }
        x["padding_mask"][:, 0] = 1  # a softmax over nothing can be NaN
        for i, row in enumerate(rows):
            x["token_ids"][i, : len(row.inputs)] = row.inputs
            x["padding_mask"][i, : len(row.inputs)] = 1
            x["positions"][i, : len(row.targets)] = row.positions
            x["targets"][i, : len(row.targets)] = row.targets
        scores = np.asarray(self._network.predict_on_batch(x))
        return _read(zip(rows, scores, strict=False))

    def _score_groups(self, groups: list[list["_Row"]]) -> dict[int, Score]:
        """As `_score`, of rows that share a context."""
        rows = [row for group in groups for row in group]
        time = self._padded(len(groups[0][0].context))
        count = next_power_of_two(max(len(row.rest) for row in rows))
        most = _power_of_four(max(len(row.targets) for row in rows))
        size = self.batch_size
        x = {
            "token_ids": np.zeros((size, time), "int32"),
            "is_prompt": np.zeros((size, time), bool),
            "rest": np.zeros((size, _AT_ONCE, count), "int32"),
            "positions": np.zeros((size, _AT_ONCE, most), "int32"),
            "targets": np.zeros((size, _AT_ONCE, most), "int32"),
        }
        for i, group in enumerate(groups):
            context = group[0].context
            x["token_ids"][i, time - len(context) :] = context
            x["is_prompt"][i, time - len(context) :] = True
            for j, row in enumerate(group):
                positions = np.subtract(row.positions, len(context))
                x["rest"][i, j, : len(row.rest)] = row.rest
                x["positions"][i, j, : len(positions)] = positions
                x["targets"][i, j, : len(positions)] = row.targets
        network = self._contexts(time, count, most)
        scores = np.asarray(network.predict_on_batch(x))
        return _read(
            (row, scores[i, j])
            for i, group in enumerate(groups)
            for j, row in enumerate(group)
        )

    def _padded(self, longest: int) -> int:
        return next(length for length in self._lengths if length >= longest)


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Padded lengths: powers of two, and halfway between, up to `longest`."""
    powers = [2**i for i in range(_SHORTEST.bit_length() - 1, 31)]
    lengths = {*powers, *(power * 3 // 2 for power in powers)}
    return (*sorted(n for n in lengths if n < longest), longest)


@dataclass
class _Row:
    """What the model reads, and what is asked of it.

    Attributes:
        inputs: Token ids.
        positions: After which of them a token is predicted.
        targets: These tokens.
        requests: Which of them are a request's.
    """

    inputs: tuple[int, ...]
    positions: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    requests: dict[int, slice] = field(default_factory=dict)

    @property
    def context(self) -> tuple[int, ...]:
        """What is read before anything is asked."""
        return self.inputs[: min(self.positions)]

    @property
    def rest(self) -> tuple[int, ...]:
        """What is read after `context`."""
        return self.inputs[min(self.positions) :]


def _power_of_four(number: int) -> int:
    """The next one, as each number is compiled."""
    return int(4 ** -(-(number - 1).bit_length() // 2))


def _read(pairs: Iterable[tuple["_Row", Any]]) -> dict[int, Score]:
    """The scores of requests from those of rows' targets, `(targets, 2)`."""
    return {
        request: (float(scores[part, 0].sum()), bool(scores[part, 1].all()))
        for row, scores in pairs
        for request, part in row.requests.items()
    }


def _share_rows(requests: Sequence[Request]) -> list[_Row]:
    """As few rows as hold all requests' inputs."""
    inputs = [(*context, *rest[:-1]) for context, rest in requests]
    rows: list[_Row] = []
    # Backwards, what begins with some ids comes right before these ids alone.
    order = sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True)
    for i in order:
        context, continuation = requests[i]
        if not rows or rows[-1].inputs[: len(inputs[i])] != inputs[i]:
            rows.append(_Row(inputs[i]))
        row, first = rows[-1], len(context) - 1
        start = len(row.targets)
        row.positions += range(first, first + len(continuation))
        row.targets += continuation
        row.requests[i] = slice(start, len(row.targets))
    return rows


def _share_contexts(
    rows: Sequence[_Row], is_possible: bool
) -> tuple[list[list[_Row]], list[_Row]]:
    """Groups of rows that share a long context, and all other rows."""
    by_context: dict[tuple[int, ...], list[_Row]] = {}
    others = []
    for row in rows:
        if is_possible and len(row.context) >= _LONG * len(row.rest):
            by_context.setdefault(row.context, []).append(row)
        else:
            others.append(row)
    groups = []
    for found in by_context.values():
        for start in range(0, len(found), _AT_ONCE):
            part = found[start : start + _AT_ONCE]
            if len(part) > 1:
                groups.append(part)
            else:
                others += part
    return groups, others


class _Network(keras.Model):
    """Log-probs of tokens at any positions, and whether they are largest."""

    def __init__(self, causal_lm: keras.Model) -> None:
        # TensorFlow takes no underscore in front.
        super().__init__(name="continuation_scores")
        self.causal_lm = causal_lm
        self.built = True

    def call(self, inputs: dict[str, Any]) -> Any:
        """Scores of `targets`.

        Args:
            inputs: Integers: `token_ids` and `padding_mask` of shape `(rows,
                time)`, the mask 1 for tokens; `positions` and `targets` of
                shape `(rows, n)`.

        Returns:
            Float32 tensor of shape `(rows, n, 2)`: the log-prob, in nats, of
            each target as the token after its position, and 1 if no token has
            a larger one.
        """
        hidden_states = self.causal_lm.backbone(
            {name: inputs[name] for name in ("token_ids", "padding_mask")},
            training=False,
        )
        return self._scores(
            hidden_states, inputs["positions"], inputs["targets"]
        )

    def _scores(self, hidden_states: Any, positions: Any, targets: Any) -> Any:
        hidden_states = ops.take_along_axis(
            hidden_states, positions[..., None], axis=1
        )  # (rows, n, width)
        rows, count = ops.shape(targets)  # tensors where TensorFlow traces
        num = rows * count
        width = hidden_states.shape[-1]
        parts = {
            "hidden_states": ops.reshape(hidden_states, (num, width)),
            "targets": ops.reshape(targets, (num,)),
        }
        tile = min(_TILE, num) if isinstance(num, int) else _TILE
        scores = backend.map_parts(self._part, parts, tile)
        return ops.reshape(scores, (rows, count, 2))

    def _part(self, inputs: dict[str, Any]) -> Any:
        head = self.causal_lm.backbone.token_embedding
        logits = head(inputs["hidden_states"], reverse=True)
        logits = ops.cast(logits, "float32")  # (positions, vocabulary)
        targets = inputs["targets"][:, None]
        own = ops.take_along_axis(logits, targets, axis=1)[:, 0]
        log_probs = own - ops.logsumexp(logits, axis=1)
        is_largest = ops.argmax(logits, axis=1) == inputs["targets"]
        return ops.stack([log_probs, ops.cast(is_largest, "float32")], axis=1)


class _Contexts(_Network):
    """As `_Network`, of several continuations of each context."""

    def __init__(self, causal_lm: keras.Model, passes: RightAligned) -> None:
        super().__init__(causal_lm)
        self.passes = passes

    def call(self, inputs: dict[str, Any]) -> Any:
        """Scores of `targets`.

        Args:
            inputs: `token_ids` and `is_prompt` of shape `(contexts, time)`,
                the contexts on the right; integers `rest` of shape `(contexts,
                k, tokens)`, and `positions` in it and `targets` of shape
                `(contexts, k, n)`.

        Returns:
            Float32 tensor of shape `(contexts, k, n, 2)`.
        """
        token_ids = inputs["token_ids"]
        cache = self.passes.prefill(
            token_ids, inputs["is_prompt"], token_ids.shape[1]
        )
        parts = [
            self._scores(
                self.passes.extend(inputs["rest"][:, i], cache),
                inputs["positions"][:, i],
                inputs["targets"][:, i],
            )
            for i in range(_AT_ONCE)
        ]
        return ops.stack(parts, axis=1)
