"""A word-level tokenizer over a short list of symbols."""

import hashlib
import json
from collections.abc import Iterable, Sequence

PAD_TOKEN = "<pad>"
END_TOKEN = "<end>"


class SymbolTokenizer:
    """One token for each whitespace-separated symbol of a text.

    For problems with a small closed vocabulary, such as spelling to
    pronunciation. Id 0 is `<pad>`, id 1 is `<end>`, then the symbols in their
    order. A symbol that stands between prompt and response ("=>" below) is a
    symbol like the others, written at the end of each prompt.

    Args:
        symbols: The symbols, without repetition or whitespace.

    Raises:
        ValueError: If a symbol is repeated, reserved or has whitespace.

    Example:
    >>> tokenizer = SymbolTokenizer(["a", "b", "=>", "AA1", "B"])
    >>> tokenizer.encode("a b =>")
    [2, 3, 4]
    >>> tokenizer.decode([5, 6, 1])
    'AA1 B <end>'
    """

    pad_token_id = 0
    end_token_ids = (1,)
    special_tokens = (PAD_TOKEN, END_TOKEN)

    def __init__(self, symbols: Iterable[str]):
        self.symbols = (*self.special_tokens, *symbols)
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        if len(self._ids) != len(self.symbols):
            repeated = {s for s in self.symbols if self.symbols.count(s) > 1}
            raise ValueError(
                f"Expected distinct symbols other than {self.special_tokens}, "
                f"received {sorted(repeated)} more than once."
            )
        broken = [s for s in self.symbols if s.split() != [s]]
        if broken:
            raise ValueError(
                "Expected symbols that aren't empty and have no whitespace, "
                f"received {broken}."
            )

    @property
    def vocabulary_size(self) -> int:
        """Number of symbols with `<pad>` and `<end>`."""
        return len(self.symbols)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The ids of the symbols in `text`.

        Args:
            text: Symbols separated by whitespace.
            parse_special: Whether `<pad>` and `<end>` are known in the text.

        Raises:
            ValueError: If the text has an unknown symbol.
        """
        known = self._ids
        if not parse_special:
            known = {s: i for s, i in known.items() if i >= 2}
        symbols = text.split()
        unknown = [symbol for symbol in symbols if symbol not in known]
        if unknown:
            raise ValueError(
                f"Unknown symbols {unknown} in {text!r}. Expected symbols "
                f"separated by whitespace, each one of {list(known)}."
            )
        return [known[symbol] for symbol in symbols]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The symbols of `token_ids`, joined by spaces."""
        return " ".join(self.symbols[int(i)] for i in token_ids)

    def fingerprint(self) -> str:
        """A hash of the symbols and their order."""
        text = json.dumps(["SymbolTokenizer", *self.symbols])
        return hashlib.sha256(text.encode()).hexdigest()
