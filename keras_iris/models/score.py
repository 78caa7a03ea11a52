"""Scoring a list of pairs with a `SelfPlayModel`."""

from collections.abc import Sequence

import numpy as np

from keras_iris.data import Example, PairDataset
from keras_iris.models.self_play_model import SelfPlayModel


def score_pairs(
    model: SelfPlayModel,
    examples: list[Example],
    synthetic: Sequence[np.ndarray],
    *,
    batch_size: int,
) -> np.ndarray:
    """Log-probs of annotated and synthetic responses under the model.

    Args:
        model: The model.
        examples: Prompts and annotated responses.
        synthetic: Token ids of a response to each prompt.
        batch_size: Pairs of a batch.

    Returns:
        Float32 array of shape `(examples, 2)`, in nats.
    """
    dataset = PairDataset(
        examples,
        synthetic,
        batch_size=min(batch_size, len(examples)),
        shuffle=False,
    )
    log_probs = np.zeros((len(examples), 2), "float32")
    for number in range(len(dataset)):
        x, _, _ = dataset[number]
        indices = dataset.indices(number)
        is_row = indices >= 0
        values = np.asarray(model.predict_on_batch(x))
        log_probs[indices[is_row]] = values[is_row]
    return log_probs
