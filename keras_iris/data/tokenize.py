"""A source of conversations to examples within limits."""

import contextlib
import itertools
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tqdm import tqdm

from keras_iris.arguments import check_count
from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import Conversation, read_conversation
from keras_iris.data.encoder import Encoder, TokenPair, as_messages
from keras_iris.data.example import Example
from keras_iris.data.rows import BadRows, OnBadRow, read_rows
from keras_iris.data.token_cache import cache_file, cached
from keras_iris.data.tokenizer import Tokenizer

OnOverflow = Literal["drop", "truncate", "error"]
T = TypeVar("T")
R = TypeVar("R")

_OVERFLOWS = ("drop", "truncate", "error")
_BATCH = 512  # rows that are encoded at once
_SECONDS_IN_SILENCE = 5.0


def tokenize(  # noqa: PLR0913
    source: Any,
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    max_prompt_length: int,
    max_response_length: int,
    on_overflow: OnOverflow = "drop",
    on_bad_row: OnBadRow = "error",
    cache_dir: str | Path | None = None,
) -> list[Example]:
    """Turns conversations into token ids.

    With a template the prompt is the rendered prompt, and the response ends
    with the template's end of turn: the ids after the first end token (a
    newline in some templates) are left out. Where the template writes no end
    token, and without a template, `tokenizer.end_token_ids[0]` is appended.
    Special tokens inside a user's text stay text.

    A file is read and encoded piece by piece, so that its text is never in
    memory as a whole. What takes long shows its progress.

    Args:
        source: Rows, a `datasets.Dataset` or the path of a file, as
            `read_conversations` takes them.
        tokenizer: A `Tokenizer`.
        template: Renders the messages; a prompt that is a string becomes a
            user message. Without one, prompts have to be strings, and are
            taken as they stand, after the tokenizer's start token.
        max_prompt_length: The longest prompt in tokens.
        max_response_length: The longest response in tokens, with the end
            token.
        on_overflow: What happens to longer ones: `"drop"` leaves the
            conversation out, `"error"` raises. `"truncate"` cuts the
            response, which then has no end token, and shortens the prompt: a
            text loses its beginning, messages the oldest question with its
            answer, again and again; system message, headers and the last
            message stay whole, and where that is too long the conversation is
            left out. One warning each counts the conversations.
        on_bad_row: What happens to a row that can't be read, rendered or
            encoded: `"error"` raises, `"drop"` leaves it out and counts it.
        cache_dir: A folder that keeps the examples, in a file whose name is
            a hash of data, tokenizer, template and limits.

    Returns:
        The examples, in the order of the conversations.

    Raises:
        ValueError: If an argument is out of range, the template can't be used
            with the tokenizer, a row is bad (the message names it) or too
            long and that is an error, or nothing is left.
    """
    if on_overflow not in _OVERFLOWS:
        raise ValueError(
            f"Expected `on_overflow` to be one of {_OVERFLOWS}, received "
            f"{on_overflow!r}."
        )
    check_count("max_prompt_length", max_prompt_length)
    check_count("max_response_length", max_response_length)
    bad_rows = BadRows(on_bad_row)
    if template is not None:
        template = template.bind(tokenizer)
        template.check(tokenizer)
    limits = _Limits(max_prompt_length, max_response_length, on_overflow)
    encoder = Encoder(tokenizer, template)
    if cache_dir is None:
        return list(_make_examples(source, encoder, limits, bad_rows))
    if isinstance(source, Iterator):  # it is read twice
        source = list(source)
    facts = [
        *(tokenizer.fingerprint(), template and template.fingerprint()),
        *(max_prompt_length, max_response_length, on_overflow, on_bad_row),
    ]
    return cached(
        cache_file(cache_dir, facts, source),
        lambda: _make_examples(source, encoder, limits, bad_rows),
    )


@dataclass
class _Limits:
    """Keeps, shortens or refuses what is too long, and counts it."""

    max_prompt_length: int
    max_response_length: int
    on_overflow: OnOverflow
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def fit(
        self,
        row: Conversation,
        pair: TokenPair | ValueError,
        encoder: Encoder,
    ) -> Example | ValueError | None:
        """The example of a row, what is wrong with it, or `None`."""
        is_cut = self.on_overflow == "truncate"
        if isinstance(pair, ValueError):
            return pair
        if is_cut and len(pair[0]) > self.max_prompt_length:
            whole, pair = pair, self._shorten(row, pair, encoder)
            if isinstance(pair, ValueError):
                return pair
            if pair is not whole:
                self.counts["have a shortened prompt"] += 1
        self.num_rows += 1
        prompt, response = pair
        if is_cut and len(response) > self.max_response_length:
            self.counts["have a cut response, without end token"] += 1
            response = response[: self.max_response_length]
        sizes = (len(prompt), len(response))
        if (
            sizes[0] <= self.max_prompt_length
            and sizes[1] <= self.max_response_length
        ):
            return Example(
                np.asarray(prompt, np.int32), np.asarray(response, np.int32)
            )
        if self.on_overflow == "error":
            raise ValueError(
                f"{row.where}: A prompt of {sizes[0]} and a response of "
                f"{sizes[1]} tokens, expected {self.at_most}. Raise the "
                "maximum, or pass `on_overflow='drop'` or 'truncate'."
            )
        self.counts["were dropped: a prompt or response is too long"] += 1
        return None

    def _shorten(
        self, row: Conversation, pair: TokenPair, encoder: Encoder
    ) -> TokenPair | ValueError:
        if encoder.template is None:
            start = len(encoder.tokenizer.start_token_ids)
            ids, rest = pair
            room = max(1, self.max_prompt_length - start)
            return [*ids[:start], *ids[start:][-room:]], rest
        messages = list(as_messages(row.prompt))
        first = int(messages[0]["role"] == "system")
        while len(pair[0]) > self.max_prompt_length:
            roles = [message["role"] for message in messages]
            if roles[first] not in roles[first + 1 :]:
                break
            # Up to the next question.
            del messages[first : roles.index(roles[first], first + 1)]
            short = Conversation(tuple(messages), row.response, row.where)
            try:
                [pair] = encoder.encode([short])
            except ValueError as error:
                return ValueError(f"{error} Its prompt had been shortened.")
        return pair

    @property
    def at_most(self) -> str:
        """Both limits, for messages."""
        return (
            f"at most {self.max_prompt_length} and {self.max_response_length}"
        )

    def report(self) -> None:
        """Says in a warning each what became of too long rows."""
        for outcome, number in self.counts.items():
            warnings.warn(
                f"{number} of {self.num_rows} conversations {outcome} "
                f"(`max_prompt_length`, `max_response_length`: "
                f"{self.at_most}).",
                stacklevel=4,
            )


def _make_examples(
    source: Any, encoder: Encoder, limits: _Limits, bad_rows: BadRows
) -> Iterator[Example]:
    rows = read_rows(source, read_conversation, bad_rows)
    batches = iter(lambda: list(itertools.islice(rows, _BATCH)), [])
    num_examples = 0
    with tqdm(unit=" rows", delay=_SECONDS_IN_SILENCE) as progress:
        encode = partial(_encode_rows, encoder, bad_rows.on_bad_row)
        for batch in _two_ahead(encode, batches):
            for row, pair in batch:
                example = limits.fit(row, pair, encoder)
                if isinstance(example, ValueError):
                    bad_rows.add(ValueError(f"{row.where}: {example}"))
                elif example is not None:
                    num_examples += 1
                    yield example
            progress.update(len(batch))
    bad_rows.report(limits.num_rows)
    limits.report()
    if not num_examples:
        raise ValueError(
            f"No example is left of {limits.num_rows + bad_rows.errors} rows. "
            f"Expected at least one with {limits.at_most} tokens in prompt "
            "and response. Raise `max_prompt_length` or `max_response_length`, "
            "or look at the rows."
            + f" The first bad one: {bad_rows.first}"
            * bool(bad_rows.errors)
        )


def _encode_rows(
    encoder: Encoder, on_bad_row: OnBadRow, rows: Sequence[Conversation]
) -> list[tuple[Conversation, TokenPair | ValueError]]:
    """Each row with its ids, or with what is wrong with it.

    A bad one is the last, unless they are dropped.
    """
    with contextlib.suppress(ValueError):
        return list(zip(rows, encoder.encode(rows), strict=True))
    results: list[tuple[Conversation, TokenPair | ValueError]] = []
    for row in rows:
        try:
            results.append((row, encoder.encode([row])[0]))
        except ValueError as error:
            results.append((row, error))
            if on_bad_row == "error":
                break
    return results


def _two_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results in their order; Python renders one while another is encoded."""
    pool = ThreadPoolExecutor(2)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Without waiting: where the caller has failed, the garbage collector
        # comes here, perhaps while `threading` holds a lock.
        pool.shutdown(wait=False, cancel_futures=True)
