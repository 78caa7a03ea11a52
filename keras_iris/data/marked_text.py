"""Keeps special tokens inside a user's text from being interpreted."""

import re
from collections.abc import Iterable, Sequence

from keras_iris.data.conversations import Message
from keras_iris.data.tokenizer import Tokenizer

_LAST_CODE_POINT = 0x10FFFD  # the end of Unicode's second private-use plane


class MarkedText:
    """Messages whose special-token strings a template cannot tell from text.

    Each special token's string in a message is replaced by one private-use
    character before rendering. In the rendered text the template's special
    tokens are encoded as such, and the characters as the strings they stand
    for, which are then only text.

    Args:
        messages: The messages.
        tokenizer: A `Tokenizer`.

    Attributes:
        messages: The messages to render.
        is_plain: Whether there is no special token's string in them.
    """

    def __init__(self, messages: Sequence[Message], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        contents = [message["content"] for message in messages]
        marks = _choose_marks(contents, tokenizer.special_tokens)
        self._strings = {mark: token for token, mark in marks.items()}
        self.is_plain = not marks
        self.messages = [
            {**message, "content": _replace(message["content"], marks)}
            for message in messages
        ]

    def encode(self, rendered: str, *, continues: bool = False) -> list[int]:
        """Ids of a text rendered from `messages`.

        Args:
            rendered: The text.
            continues: Whether other text comes before it.
        """
        if self.is_plain and not continues:
            return self._tokenizer.encode(rendered)
        token_ids: list[int] = []
        for piece in _split(rendered, self._strings):
            text = self._strings.get(piece, piece)
            parse_special = piece not in self._strings
            if token_ids or continues:
                token_ids += _encode_after(self._tokenizer, text, parse_special)
            else:
                token_ids += self._tokenizer.encode(
                    text, parse_special=parse_special
                )
        return token_ids


def _choose_marks(
    contents: Sequence[str], special_tokens: Iterable[str]
) -> dict[str, str]:
    """A private-use character for each special token in the contents."""
    everything = "\n".join(contents)
    # Some tokenizers have hundreds, most of which start alike.
    starts = {token[:2] for token in special_tokens}
    starts = {start for start in starts if start in everything}
    present = [
        token
        for token in special_tokens
        if token[:2] in starts and token in everything
    ]
    if not present:
        return {}
    used = set(everything)
    free = (
        chr(code)
        for code in range(_LAST_CODE_POINT, 0, -1)
        if chr(code) not in used
    )
    longest_first = sorted(present, key=len, reverse=True)
    return dict(zip(longest_first, free, strict=False))


def _replace(text: str, marks: dict[str, str]) -> str:
    if not marks:
        return text
    pattern = "|".join(map(re.escape, marks))
    return re.sub(pattern, lambda match: marks[match[0]], text)


def _split(text: str, marks: Iterable[str]) -> list[str]:
    alternatives = "|".join(map(re.escape, marks)) or "(?!)"
    return [piece for piece in re.split(f"({alternatives})", text) if piece]


def _encode_after(
    tokenizer: Tokenizer, text: str, parse_special: bool
) -> list[int]:
    # Some tokenizers put a space before the start of a text. After a newline
    # they don't.
    anchor = tokenizer.encode("\n", parse_special=parse_special)
    token_ids = tokenizer.encode("\n" + text, parse_special=parse_special)
    if token_ids[: len(anchor)] == anchor:
        return token_ids[len(anchor) :]
    return tokenizer.encode(text, parse_special=parse_special)
