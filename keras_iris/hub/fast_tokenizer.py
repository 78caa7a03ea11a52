"""The `tokenizers` library behind the `Tokenizer` protocol."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any


class FastTokenizer:
    """A tokenizer.json, which gives the ids that transformers gives.

    KerasHub 0.32's byte-pair tokenizers give other ids: they hand their split
    expression to `tokenizers` as a literal string.

    Its special tokens are the added tokens that the definition calls special,
    and the end tokens. Other added tokens, such as `<think>`, are found in
    every text.

    Args:
        definition: The content of a tokenizer.json.
        end_token_ids: Ids that end a response, the usual one first.
        pad_token_id: The id of padding. Defaults to the first end token's.

    Raises:
        ValueError: If the definition isn't one, there is no end token, or
            an id isn't in the vocabulary.
    """

    def __init__(
        self,
        definition: str,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int | None = None,
    ):
        self._tokenizer = _parse(definition)
        self._plain = _without_special_tokens(definition, end_token_ids)
        added = self._plain.get_added_tokens_decoder().values()
        self.special_tokens = tuple(t.content for t in added if t.special)
        self.vocabulary_size = 1 + max(
            self._tokenizer.get_vocab(with_added_tokens=True).values()
        )
        self.end_token_ids = tuple(dict.fromkeys(end_token_ids))
        if not self.end_token_ids:
            raise ValueError(
                "The tokenizer has no end token. Expected `eos_token_id` in "
                "generation_config.json, or `eos_token` in "
                "tokenizer_config.json; add one of them to the folder."
            )
        if pad_token_id is None:
            pad_token_id = self.end_token_ids[0]
        self.pad_token_id = pad_token_id
        for token_id in (*self.end_token_ids, pad_token_id):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"End or padding token id {token_id} isn't in the "
                    f"tokenizer's vocabulary of {self.vocabulary_size}. The "
                    "files belong to different models; download them again."
                )

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The token ids of `text`, with no start or end token added.

        Args:
            text: The text.
            parse_special: Whether special tokens in the text become their
                ids.
        """
        tokenizer = self._tokenizer if parse_special else self._plain
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens as their strings."""
        ids = [int(token_id) for token_id in token_ids]
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """The string of one id, as the vocabulary has it."""
        return str(self._tokenizer.id_to_token(token_id))

    def fingerprint(self) -> str:
        """A hash of the definition and the end tokens."""
        facts = [self.definition(), self.end_token_ids]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def definition(self) -> str:
        """The content of a tokenizer.json."""
        return str(self._tokenizer.to_str(pretty=True))


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
