"""Log-probs of continuations of contexts, many at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.arguments import check_count
from keras_iris.models.checks import check_causal_lm
from keras_iris.models.score import divisible_batch_size

Request: TypeAlias = tuple[list[int], list[int]]  # context, continuation
Score: TypeAlias = tuple[float, bool]

# Positions whose logits are held at a time.
_TILE = 256
_SHORTEST = 32


class ContinuationScorer:
    """Scores continuations of contexts under a causal LM.

    What comes before the last token of a continuation is computed once for
    all requests that it is the beginning of: the letters of a multiple choice
    are one row of a batch. Rows are sorted by length and padded to a few
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
        longest = len(rows[0].inputs)
        time = next(length for length in self._lengths if length >= longest)
        # A power of four, as each number is compiled.
        most = max(len(row.targets) for row in rows)
        most = 4 ** -(-(most - 1).bit_length() // 2)
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
        return {
            request: (
                float(scores[i, part, 0].sum()),
                bool(scores[i, part, 1].all()),
            )
            for i, row in enumerate(rows)
            for request, part in row.requests.items()
        }


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
        hidden_states = ops.take_along_axis(
            hidden_states, inputs["positions"][..., None], axis=1
        )  # (rows, n, width)
        targets = inputs["targets"]
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
