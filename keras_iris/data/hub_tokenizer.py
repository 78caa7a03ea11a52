"""KerasHub tokenizers behind the `Tokenizer` protocol."""

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class HubTokenizer:
    """Adapts a `keras_hub.tokenizers.Tokenizer`.

    KerasHub always interprets special tokens; here
    `encode(..., parse_special=False)` keeps them plain text.

    Args:
        tokenizer: The KerasHub tokenizer.
        end_token_ids: Ids that end a response. Defaults to the tokenizer's own
            end tokens.

    Raises:
        ValueError: If the tokenizer pads, cuts or adds start or end tokens, or
            has no end token and `end_token_ids` isn't given.
    """

    def __init__(
        self, tokenizer: Any, *, end_token_ids: Sequence[int] | None = None
    ):
        self.tokenizer = tokenizer
        config = tokenizer.get_config()
        _refuse_additions(config)
        if end_token_ids is None:
            end_token_ids = _end_token_ids(tokenizer)
        self.end_token_ids = tuple(int(i) for i in end_token_ids)
        if not self.end_token_ids:
            raise ValueError(
                f"{type(tokenizer).__name__} has no end token. Pass "
                "`end_token_ids=(...,)`, the ids that end a response."
            )
        self.vocabulary_size = int(tokenizer.vocabulary_size())
        self.pad_token_id = int(getattr(tokenizer, "pad_token_id", 0) or 0)
        special = {
            *tokenizer.special_tokens,
            *(config.get("unsplittable_tokens") or ()),
        }
        self.special_tokens = tuple(sorted(special, key=_longest_first))
        alternatives = "|".join(map(re.escape, self.special_tokens))
        self._special = re.compile(f"({alternatives or '(?!)'})")
        self._special_ids = {
            int(tokenizer.token_to_id(token)) for token in self.special_tokens
        }

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The token ids of `text`, with no start or end token added.

        Args:
            text: The text.
            parse_special: Whether special tokens in the text become their
                ids.
        """
        pieces = self._special.split(text)  # text, special, text, ...
        if parse_special:
            return [
                token_id
                for i, piece in enumerate(pieces)
                for token_id in self._encode_piece(piece, bool(i % 2))
            ]
        token_ids = self._encode_text(text)
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        return [
            token_id
            for piece in _cut_special(pieces)
            for token_id in self._encode_text(piece)
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""
        return str(self.tokenizer.detokenize([int(i) for i in token_ids]))

    def fingerprint(self) -> str:
        """A hash of the tokenizer's class, configuration and assets."""
        config = self.tokenizer.get_config()
        config.pop("name", None)
        facts = [type(self.tokenizer).__name__, config, self.end_token_ids]
        digest = hashlib.sha256(
            json.dumps(facts, sort_keys=True, default=str).encode()
        )
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_assets(folder)
            for file in sorted(Path(folder).iterdir()):
                digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()

    def _encode_piece(self, piece: str, is_special: bool) -> list[int]:
        if is_special:
            return [int(self.tokenizer.token_to_id(piece))]
        return self._encode_text(piece)

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        return [int(i) for i in np.asarray(self.tokenizer.tokenize(text))]


def _refuse_additions(config: dict[str, Any]) -> None:
    names = ("sequence_length", "add_bos", "add_eos")
    given = {name: config[name] for name in names if config.get(name)}
    if given:
        raise ValueError(
            f"The tokenizer was made with {given}. Expected one that gives "
            "the ids of the text only, because padding and end tokens are "
            "added later. Make it without these arguments."
        )


def _end_token_ids(tokenizer: Any) -> tuple[int, ...]:
    # Llama3Tokenizer has a second end token, <|eot_id|>.
    names = ("end_token_id", "end_token2_id")
    ids = (getattr(tokenizer, name, None) for name in names)
    return tuple(token_id for token_id in ids if token_id is not None)


def _cut_special(pieces: Sequence[str]) -> list[str]:
    # A special token cut after its first character is only text.
    cut = [pieces[0]]
    for special, text in zip(pieces[1::2], pieces[2::2], strict=True):
        cut[-1] += special[:1]
        cut.append(special[1:] + text)
    return cut


def _longest_first(token: str) -> tuple[int, str]:
    return -len(token), token
