"""A tokenised prompt and its annotated response."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keras_iris.data.conversations import labelled_rows

TokenIds: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised prompt and its annotated response.

    Args:
        prompt_ids: int32 of shape `(prompt_length,)`.
        response_ids: int32 of shape `(response_length,)`, with the end token.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds


def read_examples(source: Any) -> list[Example]:
    """Reads rows that are tokenised already.

    For models that have no tokenizer (`preprocessor=None`).

    Args:
        source: An iterable of rows `{"prompt_ids", "response_ids"}`, each a
            list of integers, or the path of a `.jsonl` or `.parquet` file of
            such rows. The response has its end token.

    Returns:
        The examples, in the order of the rows.

    Raises:
        ValueError: If there are no rows, or a row lacks one of the keys or
            has no ids. The message names the row.

    Example:
    >>> read_examples([{"prompt_ids": [4, 5], "response_ids": [6, 1]}])
    [Example(prompt_ids=array([4, 5], dtype=int32), \
response_ids=array([6, 1], dtype=int32))]
    """
    examples = [
        Example(
            _token_ids(row, "prompt_ids", where),
            _token_ids(row, "response_ids", where),
        )
        for where, row in labelled_rows(source)
    ]
    if not examples:
        raise ValueError(
            "The data is empty. Expected at least one row of the form "
            '{"prompt_ids", "response_ids"}.'
        )
    return examples


def check_vocabulary(examples: Iterable[Example], vocabulary_size: int) -> None:
    """Refuses token ids that a model doesn't have.

    Args:
        examples: The tokenised data.
        vocabulary_size: Number of ids of the model.

    Raises:
        ValueError: If an id is negative, or not below `vocabulary_size`.
    """
    for index, example in enumerate(examples):
        token_ids = np.concatenate([example.prompt_ids, example.response_ids])
        if not token_ids.size:
            continue
        smallest, largest = int(token_ids.min()), int(token_ids.max())
        if smallest < 0 or largest >= vocabulary_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(
                f"Vocabulary mismatch: example {index} has the token id "
                f"{wrong}, expected ids from 0 to {vocabulary_size - 1}, the "
                "model's vocabulary. Use the tokenizer that the model was "
                "trained with."
            )


def _token_ids(row: Any, key: str, where: str) -> TokenIds:
    if not isinstance(row, dict) or key not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"{where} has no {key!r}: received {keys}, expected "
            "'prompt_ids' and 'response_ids'."
        )
    values: Sequence[int] | None = row[key]
    token_ids = np.asarray([] if values is None else values)
    if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: expected {key!r} to be a list of at least one integer, "
            f"received {str(values)[:80]}."
        )
    if token_ids.size and not 0 <= token_ids.min() <= token_ids.max() < 2**31:
        raise ValueError(
            f"{where}: expected {key!r} to be ids of at least 0 that fit 32 "
            f"bits, received {token_ids.min()} to {token_ids.max()}."
        )
    return token_ids.astype(np.int32)
