"""A tokenised prompt and its annotated response."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

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
