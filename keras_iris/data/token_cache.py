"""Tokenised examples kept on disk."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import Conversation
from keras_iris.data.example import Example, TokenIds
from keras_iris.data.tokenize import OnOverflow, tokenize
from keras_iris.data.tokenizer import Tokenizer
from keras_iris.files import replaced

_FORMAT = 2  # advance when `tokenize` gives other ids


def cached_tokenize(  # noqa: PLR0913
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    template: ChatTemplate | None = None,
    max_prompt_length: int,
    max_response_length: int,
    on_overflow: OnOverflow = "drop",
) -> list[Example]:
    """`tokenize`, done once for the same data, tokenizer and template.

    The examples are kept in an Arrow file of `cache_dir`, which
    `datasets.Dataset.from_file` also opens. Its name is a hash of all
    arguments. A damaged file is made again, with a warning.

    Args:
        conversations: What to tokenise.
        tokenizer: A `Tokenizer`.
        cache_dir: A folder; made if it doesn't exist.
        template: As in `tokenize`.
        max_prompt_length: As in `tokenize`.
        max_response_length: As in `tokenize`.
        on_overflow: As in `tokenize`.

    Returns:
        The examples, in the order of the conversations.
    """
    options: dict[str, Any] = {
        "max_prompt_length": max_prompt_length,
        "max_response_length": max_response_length,
        "on_overflow": on_overflow,
    }
    facts = [
        _FORMAT,
        tokenizer.fingerprint(),
        tokenizer.end_token_ids,
        template.fingerprint() if template else None,
        options,
    ]
    path = (
        Path(cache_dir).expanduser()
        / f"tokens-{_hash(facts, conversations)}.arrow"
    )
    if path.is_file():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(
                f"The cache file {path} is damaged ({error}) and is made "
                "again.",
                stacklevel=2,
            )
    examples = tokenize(conversations, tokenizer, template=template, **options)
    _write(path, examples)
    return examples


def _hash(facts: list[Any], conversations: Sequence[Conversation]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for conversation in conversations:
        row = [conversation.prompt, conversation.response]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:32]


def _write(path: Path, examples: Sequence[Example]) -> None:
    import pyarrow  # type: ignore[import-untyped]

    table = pyarrow.table(
        {
            "prompt_ids": _column([e.prompt_ids for e in examples]),
            "response_ids": _column([e.response_ids for e in examples]),
        }
    )
    with replaced(path) as temporary, pyarrow.OSFile(str(temporary), "wb") as f:
        with pyarrow.ipc.new_stream(f, table.schema) as writer:
            writer.write_table(table)


def _column(rows: Sequence[TokenIds]) -> Any:
    import pyarrow

    ends = np.cumsum([len(row) for row in rows])
    return pyarrow.LargeListArray.from_arrays(
        np.concatenate([[0], ends]).astype(np.int64),
        pyarrow.array(np.concatenate(rows), pyarrow.int32()),
    )


def _read(path: Path) -> list[Example]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        table = pyarrow.ipc.open_stream(file).read_all()
    prompts, responses = (
        _rows(table.column(name).combine_chunks())
        for name in ("prompt_ids", "response_ids")
    )
    return [Example(p, r) for p, r in zip(prompts, responses, strict=True)]


def _rows(column: Any) -> list[TokenIds]:
    return np.split(column.values.to_numpy(), column.offsets.to_numpy()[1:-1])
