"""Text to token ids and back, by the `tokenizers` library."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class Tokenizer:
    """A tokenizer.json, which gives the ids that transformers gives.

    Its special tokens are the added tokens that the definition calls special,
    and the end tokens. Other added tokens, such as `<think>`, are found in
    every text.

    Args:
        definition: The content of a tokenizer.json.
        end_token_ids: Ids that end a response, the usual one first: it is
            appended where a template writes none.
        pad_token_id: The id of padding. Defaults to the first end token's.
        folder: The checkpoint it is of, whose other files an export copies.

    Attributes:
        start_token_ids: What the definition puts before a text.
        added_tokens: The strings that aren't found by merging.
        special_tokens: Those of them that `encode` knows if `parse_special`.
        special_pattern: Finds them, the longest first.
        cutting_tokens: Those of them before which a text can be cut in two
            that are encoded apart.
        vocabulary_size: One more than the largest token id.

    Raises:
        ValueError: If the definition isn't one, there is no end token, or
            an id isn't in the vocabulary.
    """

    def __init__(
        self,
        definition: str,
        *,
        end_token_ids: Iterable[int],
        pad_token_id: int | None = None,
        folder: Path | None = None,
    ):
        self.folder = folder
        self.end_token_ids = tuple(dict.fromkeys(end_token_ids))
        self._tokenizer = _parse(definition)
        self._plain = _without_special_tokens(definition, self.end_token_ids)
        every = self._plain.get_added_tokens_decoder().values()
        self.added_tokens = tuple(token.content for token in every)
        added = [token for token in every if token.special]
        self.special_tokens = tuple(token.content for token in added)
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile(
            "|".join(map(re.escape, longest_first)) or "(?!)"
        )
        self.cutting_tokens = tuple(
            token.content
            for token in added
            if not (token.lstrip or token.normalized or token.single_word)
        )
        self.vocabulary_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values()
        )
        if not self.end_token_ids:
            raise ValueError(
                "The tokenizer has no end token. Expected `eos_token_id` in "
                "generation_config.json, or `eos_token` in "
                "tokenizer_config.json; add one of them to the folder."
            )
        self.start_token_ids = tuple(_added_before(self._tokenizer))
        if pad_token_id is None:
            pad_token_id = self.end_token_ids[0]
        self.pad_token_id = pad_token_id
        for token_id in (*self.end_token_ids, pad_token_id):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"The end or padding token id {token_id} isn't in "
                    f"the tokenizer's vocabulary of {self.vocabulary_size}. "
                    "The files belong to different models; download them again."
                )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The token ids of a text, with no start or end token added.

        Args:
            text: The text.
            parse_special: Whether a special token's string in the text
                becomes its id; if not, it is text like any other.
        """
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[list[int]]:
        """As `encode`, of many texts at once, on all cores."""
        tokenizer = self._tokenizer if parse_special else self._plain
        found = tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [encoding.ids for encoding in found]

    def decode(
        self, token_ids: Iterable[int], *, skip_special: bool = False
    ) -> str:
        """The text of token ids.

        Args:
            token_ids: The ids.
            skip_special: Whether the definition's special tokens are left
                out; if not, they are written as their strings.
        """
        ids = [int(token_id) for token_id in token_ids]
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=skip_special)
        )

    def token(self, token_id: int) -> str:
        """The string of one id, as the vocabulary has it."""
        return str(self._tokenizer.id_to_token(token_id))

    def definition(self) -> str:
        """The content of a tokenizer.json."""
        return str(self._tokenizer.to_str(pretty=True))

    def fingerprint(self) -> str:
        """A hash that changes whenever other ids may come out."""
        facts = [self.definition(), self.end_token_ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class SymbolTokenizer(Tokenizer):
    """One token for each whitespace-separated symbol of a text.

    For problems with a small closed vocabulary, such as spelling to
    pronunciation. Id 0 is `<pad>`, id 1 is `<end>`, then the symbols in their
    order. A symbol that stands between prompt and response ("=>" below) is a
    symbol like the others, written at the end of each prompt.

    Args:
        symbols: The symbols, without repetition or whitespace.

    Raises:
        ValueError: If a symbol is repeated, reserved or has whitespace.

    Examples:
        >>> tokenizer = SymbolTokenizer(["a", "b", "=>", "AA1", "B"])
        >>> tokenizer.encode("a b =>")
        [2, 3, 4]
        >>> tokenizer.decode([5, 6, 1])
        'AA1 B <end>'
    """

    def __init__(self, symbols: Iterable[str]):
        from tokenizers import Tokenizer, models, pre_tokenizers

        names = ["<pad>", "<end>", *symbols]
        self._ids = {name: i for i, name in enumerate(names)}
        broken = [s for s in names if s.split() != [s] or names.count(s) > 1]
        if broken:
            raise ValueError(
                "Expected distinct symbols without whitespace, other than "
                f"'<pad>' and '<end>', received {sorted(set(broken))}."
            )
        tokenizer = Tokenizer(models.WordLevel(self._ids, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<pad>", "<end>"])
        super().__init__(tokenizer.to_str(), end_token_ids=[1], pad_token_id=0)

    def encode_batch(
        self, texts: Sequence[str], *, parse_special: bool = True
    ) -> list[list[int]]:
        """As `encode`, of many texts.

        Raises:
            ValueError: If a text has an unknown symbol.
        """
        first = 0 if parse_special else len(self.special_tokens)
        rows = []
        for text in texts:
            spaced = text
            for token in self.special_tokens[first:]:
                spaced = spaced.replace(token, f" {token} ")
            rows.append(spaced.split())
            unknown = [s for s in rows[-1] if self._ids.get(s, -1) < first]
            if unknown:
                raise ValueError(
                    f"Unknown symbols {unknown} in {text!r}. Expected symbols "
                    "separated by whitespace, each one of "
                    f"{list(self._ids)[first:]}."
                )
        return [[self._ids[symbol] for symbol in row] for row in rows]


def _parse(definition: str) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(
            f"The tokenizer.json cannot be read: {error}. Expected a file of "
            "the `tokenizers` library; download it again, or update the "
            "library."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_special_tokens(
    definition: str, end_token_ids: Sequence[int]
) -> Any:
    """The same tokenizer, for which special and end tokens are text."""
    content = json.loads(definition)
    for token in content.get("added_tokens", []):
        token["special"] = token["special"] or token["id"] in end_token_ids
    tokenizer = _parse(json.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _added_before(tokenizer: Any) -> list[int]:
    """What the definition puts before a text, and not behind it."""
    text = tokenizer.encode("a", add_special_tokens=False).ids
    full = tokenizer.encode("a").ids
    places = range(len(full) - len(text) + 1)
    first = next((i for i in places if full[i : i + len(text)] == text), 0)
    return list(full[:first])
