"""What the package asks of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back, outside of any model.

    `HubTokenizer` adapts a KerasHub tokenizer to it, `SymbolTokenizer` is a
    small one made of a list of symbols.
    """

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""

    @property
    def pad_token_id(self) -> int:
        """The id that fills positions where the padding mask is 0."""

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Generation stops at any; the first is appended to a response."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The strings that `encode` interprets only if `parse_special`."""

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text, without a start or end token of its own.

        Args:
            text: The text.
            parse_special: Whether a special token's string in the text
                becomes its id; if not, it is text like any other.
        """

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written as their strings."""

    def fingerprint(self) -> str:
        """A hash that changes whenever `encode` may give other ids."""
