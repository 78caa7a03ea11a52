"""Log-probs of continuations of contexts, many at a time."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.arguments import check_count
from keras_iris.data.buckets import next_power_of_two
from keras_iris.generation.rowwise import Rowwise, rowwise
from keras_iris.models.checks import check_causal_lm
from keras_iris.models.score import divisible_batch_size

Request: TypeAlias = tuple[list[int], list[int]]  # context, continuation
Score: TypeAlias = tuple[float, bool]

# Positions whose logits are held at a time.
_TILE = 256
_SHORTEST = 32
# How many times as long as a beginning all that follows it in one row may be:
# attention computes scores of all pairs of tokens, and masks most.
_MOST_BRANCHES = 2


class ContinuationScorer:
    """Scores continuations of contexts under a causal LM.

    What several requests begin with is computed once for all of them, as far
    as they are scored together: a context with its endings, or the solved
    examples in front of all questions of a task. They are branches of one row,
    masked from each other (Llama, Mistral, Qwen; other models share what comes
    before the last token of a continuation). Rows are sorted by length and
    padded to a few lengths, so that few shapes are compiled.

    Args:
        causal_lm: As in `keras_iris.SelfPlayModel`.
        batch_size: Texts of a forward pass; as many more as it takes for the
            devices that share a batch to divide it.
        max_length: Tokens of a text that the model reads at most.

    Raises:
        ValueError: If an argument can't be used.
    """

    def __init__(
        self, causal_lm: Any, *, batch_size: int, max_length: int
    ) -> None:
        check_causal_lm(causal_lm)
        self._shares = backend.num_row_shares()
        self.batch_size = divisible_batch_size(
            check_count("batch_size", batch_size)
        )
        self.max_length = check_count("max_length", max_length, at_least=2)
        self._passes = rowwise(causal_lm)
        self._most, longest = 1, max_length  # of a row: texts and tokens
        if self._passes is not None:
            self._most = self.batch_size // self._shares
            longest *= 1 + _MOST_BRANCHES
        self._lengths = lengths_up_to(longest)
        self._network = _Network(causal_lm, self._passes)

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
        texts = _share_texts([self._cut(*request) for request in requests])
        rows = sorted(_make_rows(texts, self._most), key=len, reverse=True)
        batch: list[_Row] = []
        count = 0
        for row in rows:
            count += len(row.texts)
            if count > self.batch_size and len(batch) >= self._shares:
                yield self._score(batch)
                batch, count = [], len(row.texts)
            batch.append(row)
        if batch:
            yield self._score(batch)

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
        filled = [row.lay_out() for row in rows]
        time = next(n for n in self._lengths if n >= len(rows[0]))
        asked = next_power_of_two(max(len(x["asked"]) for x in filled))
        num_rows = next_power_of_two(-(-len(rows) // self._shares))
        num_rows = min(self.batch_size, self._shares * num_rows)
        batch = {
            name: np.zeros(
                (num_rows, asked if name in ("asked", "targets") else time),
                "int32",
            )
            for name in filled[0]
        }
        batch["padding_mask"][:, 0] = 1  # a softmax over nothing can be NaN
        for i, x in enumerate(filled):
            for name, values in x.items():
                batch[name][i, : len(values)] = values
        scores = np.asarray(self._network.predict_on_batch(batch))
        found: dict[int, Score] = {}
        for row, of_row in zip(rows, scores, strict=False):
            found |= row.read(of_row)
        return found


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Padded lengths: powers of two, and halfway between, up to `longest`."""
    powers = [2**i for i in range(_SHORTEST.bit_length() - 1, 31)]
    lengths = {*powers, *(power * 3 // 2 for power in powers)}
    return (*sorted(n for n in lengths if n < longest), longest)


@dataclass
class _Text:
    """What the model reads, and what is asked of it.

    Attributes:
        token_ids: What is read.
        asked: After which of them a token is predicted.
        targets: These tokens.
        requests: Which of them are a request's.
    """

    token_ids: tuple[int, ...]
    asked: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    requests: dict[int, slice] = field(default_factory=dict)


class _Row:
    """Texts with one beginning, and the branches that follow it."""

    def __init__(self, text: _Text) -> None:
        self.texts = [text]
        self._start = len(text.token_ids)  # where they differ

    def __len__(self) -> int:
        lengths = [len(text.token_ids) for text in self.texts]
        return sum(lengths) - (len(lengths) - 1) * self._start

    def take(self, text: _Text, most: int) -> bool:
        """Adds a text, if that saves tokens and there are at most `most`."""
        count = len(self.texts)
        if count == most:
            return False
        start = min(self._start, _common_length(self.texts[-1], text))
        lengths = [len(text.token_ids) for text in [*self.texts, text]]
        branches = sum(lengths) - len(lengths) * start
        is_taken = (
            count * start > (count - 1) * self._start
            and branches <= _MOST_BRANCHES * start
        )
        if is_taken:
            self.texts.append(text)
            self._start = start
        return is_taken

    def lay_out(self) -> dict[str, list[int]]:
        """A row of what `_Network` takes."""
        start = self._start
        token_ids = list(self.texts[0].token_ids[:start])
        x = {
            "token_ids": token_ids,
            "positions": list(range(start)),
            "branches": [0] * start,
            "asked": [],
            "targets": [],
        }
        for number, text in enumerate(self.texts, 1):
            shift = len(token_ids) - start
            x["asked"] += [i + shift * (i >= start) for i in text.asked]
            x["targets"] += text.targets
            branch = text.token_ids[start:]
            token_ids += branch
            x["positions"] += range(start, start + len(branch))
            x["branches"] += [number] * len(branch)
        return x | {"padding_mask": [1] * len(token_ids)}

    def read(self, scores: Any) -> dict[int, Score]:
        """The scores of requests from those of the targets, `(targets, 2)`."""
        found = {}
        for text in self.texts:
            for request, part in text.requests.items():
                log_probs, is_largest = scores[part].T
                found[request] = (
                    float(log_probs.sum()),
                    bool(is_largest.all()),
                )
            scores = scores[len(text.targets) :]
        return found


def _common_length(one: _Text, other: _Text) -> int:
    """How many token ids two texts begin with in common."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))


def _share_texts(requests: Sequence[Request]) -> list[_Text]:
    """As few texts as hold all requests' inputs, with likes side by side."""
    inputs = [(*context, *rest[:-1]) for context, rest in requests]
    texts: list[_Text] = []
    # Backwards, what begins with some ids comes right before these ids alone.
    order = sorted(range(len(inputs)), key=lambda i: inputs[i], reverse=True)
    for i in order:
        context, continuation = requests[i]
        if not texts or texts[-1].token_ids[: len(inputs[i])] != inputs[i]:
            texts.append(_Text(inputs[i]))
        text, first = texts[-1], len(context) - 1
        start = len(text.targets)
        text.asked += range(first, first + len(continuation))
        text.targets += continuation
        text.requests[i] = slice(start, len(text.targets))
    return texts


def _make_rows(texts: Sequence[_Text], most: int) -> list[_Row]:
    """Rows of at most `most` texts, likes together."""
    rows: list[_Row] = []
    for text in texts:
        if not rows or not rows[-1].take(text, most):
            rows.append(_Row(text))
    return rows


class _Network(keras.Model):
    """Log-probs of tokens at any positions, and whether they are largest."""

    def __init__(self, causal_lm: keras.Model, passes: Rowwise | None) -> None:
        # TensorFlow takes no underscore in front.
        super().__init__(name="continuation_scores")
        self.causal_lm = causal_lm
        self.passes = passes
        self.built = True

    def call(self, inputs: dict[str, Any]) -> Any:
        """Scores of `targets`.

        Args:
            inputs: Integers. Of shape `(rows, time)`: `token_ids`,
                `padding_mask`, 1 for tokens, `positions` and `branches` as in
                `Rowwise.branch`. Of shape `(rows, n)`: `asked`, places in
                a row, and `targets`.

        Returns:
            Float32 tensor of shape `(rows, n, 2)`: the log-prob, in nats, of
            each target as the token after its place, and 1 if no token has a
            larger one.
        """
        if self.passes is None:
            hidden_states = self.causal_lm.backbone(
                {name: inputs[name] for name in ("token_ids", "padding_mask")},
                training=False,
            )
        else:
            hidden_states = self.passes.branch(
                inputs["token_ids"], inputs["positions"], inputs["branches"]
            )
        hidden_states = ops.take_along_axis(
            hidden_states, inputs["asked"][..., None], axis=1
        )  # (rows, n, width)
        rows, count = ops.shape(inputs["targets"])  # tensors in TensorFlow
        num = rows * count
        width = hidden_states.shape[-1]
        parts = {
            "hidden_states": ops.reshape(hidden_states, (num, width)),
            "targets": ops.reshape(inputs["targets"], (num,)),
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
