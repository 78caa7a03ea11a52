"""Keeps special tokens inside a user's text from being interpreted."""

import re
from collections.abc import Sequence
from functools import partial

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
        pattern = tokenizer.special_pattern
        # Roles are the template's words.
        everything = "\n".join(
            text for m in messages for key, text in m.items() if key != "role"
        )
        found = dict.fromkeys(pattern.findall(everything))
        self.is_plain = not found
        self._strings: dict[str, str] = {}
        if self.is_plain:
            self.messages = list(messages)
            return
        codes = range(_LAST_CODE_POINT, 0, -1)
        free = (c for c in map(chr, codes) if c not in everything)
        marks = dict(zip(found, free, strict=False))
        self._strings = {mark: token for token, mark in marks.items()}

        def mark(text: str) -> str:
            return pattern.sub(lambda found: marks[found[0]], text)

        self.messages = [
            {key: t if key == "role" else mark(t) for key, t in m.items()}
            for m in messages
        ]

    def encode(self, rendered: str, *, continues: bool = False) -> list[int]:
        """Ids of a text rendered from `messages`.

        Args:
            rendered: The text.
            continues: Whether other text comes before it.
        """
        alternatives = "|".join(map(re.escape, self._strings)) or "(?!)"
        token_ids: list[int] = []
        for piece in filter(None, re.split(f"({alternatives})", rendered)):
            text = self._strings.get(piece, piece)
            parse_special = piece not in self._strings
            is_first = not token_ids and not continues
            token_ids += self._encode(text, parse_special, is_first)
        return token_ids

    def _encode(
        self, text: str, parse_special: bool, is_first: bool
    ) -> list[int]:
        encode = partial(self._tokenizer.encode, parse_special=parse_special)
        if is_first:
            return encode(text)
        # Some tokenizers put a space before the start of a text. After a
        # newline they don't.
        anchor, token_ids = encode("\n"), encode("\n" + text)
        if token_ids[: len(anchor)] == anchor:
            return token_ids[len(anchor) :]
        return encode(text)
