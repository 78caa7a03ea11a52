"""A tokenised prompt and its annotated response."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keras_iris.files import hash_arrays

TokenIds: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """A tokenised prompt and its annotated response.

    Args:
        prompt_ids: int32 of shape `(prompt_length,)`.
        response_ids: int32 of shape `(response_length,)`, with the end token.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds


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
        check_ids(f"example {index}", token_ids, vocabulary_size)


def check_ids(
    name: str, token_ids: NDArray[np.integer[Any]], vocabulary_size: int
) -> None:
    """Refuses an array with token ids that a model doesn't have."""
    wrong = token_ids[(token_ids < 0) | (token_ids >= vocabulary_size)]
    if wrong.size:
        raise ValueError(
            f"Vocabulary mismatch: {name} has the token id {wrong[0]}, "
            f"expected ids from 0 to {vocabulary_size - 1}, the model's "
            "vocabulary. Use the tokenizer that the model was trained with."
        )


def hash_examples(examples: Sequence[Example]) -> str:
    """A hash of the examples' ids."""
    ids = [
        np.asarray(part, "int32")
        for example in examples
        for part in (example.prompt_ids, example.response_ids)
    ]
    lengths = np.array([len(part) for part in ids], "int32")
    return hash_arrays({"ids": np.concatenate(ids), "lengths": lengths})[:16]
