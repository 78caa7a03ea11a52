"""Scoring responses with a `SelfPlayModel`."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.data import Example, PairDataset, pad_pairs
from keras_iris.data.buckets import next_power_of_two
from keras_iris.models.self_play_model import SelfPlayModel


def divisible_batch_size(size: int) -> int:
    """The next batch size that the devices which share a batch divide."""
    count = backend.num_row_shares()
    return -(-size // count) * count


def score_pairs(  # noqa: PLR0913
    model: SelfPlayModel,
    examples: list[Example],
    synthetic: Sequence[np.ndarray] | None,
    *,
    batch_size: int,
    bucket_lengths: Sequence[int] | None = None,
    proto_synthetic: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Log-probs of annotated and synthetic responses under the model.

    Args:
        model: The model.
        examples: Prompts and annotated responses.
        synthetic: Token ids of a response to each prompt. `None` scores the
            annotated responses alone.
        batch_size: Pairs of a batch.
        bucket_lengths: As in `keras_iris.data.PairDataset`.
        proto_synthetic: As in `PairDataset`.

    Returns:
        Float32 array of shape `(examples, 2)`, in nats; `(examples, 3)` with
        `proto_synthetic`, `(examples, 1)` without `synthetic`.
    """
    size = divisible_batch_size(min(batch_size, len(examples)))
    missing = max(0, size - len(examples))

    def filled(rows: Any) -> Any:
        return rows and [*rows, *[rows[-1]] * missing]

    dataset = PairDataset(
        filled(examples),
        filled(synthetic),
        proto_synthetic=filled(proto_synthetic),
        batch_size=size,
        bucket_lengths=bucket_lengths,
        shuffle=False,
    )
    return np.asarray(model.predict(dataset, verbose=0))[: len(examples)]


class TokenScorer:
    """Log-probs of single tokens under a model, for a look at few responses.

    Args:
        model: The model.
    """

    def __init__(self, model: SelfPlayModel) -> None:
        self._network = _TokenLogProbs(model)

    def __call__(
        self, examples: list[Example], responses: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Scores a response to each prompt, all in one batch.

        Args:
            examples: Their prompts are taken.
            responses: Token ids.

        Returns:
            A float32 array of each response's length, in nats.
        """
        rows = [
            Example(example.prompt_ids, response)
            for example, response in zip(examples, responses, strict=True)
        ]
        longest = max(len(r.prompt_ids) + len(r.response_ids) for r in rows)
        # A power of two, so that few lengths are compiled.
        x = pad_pairs(rows, None, next_power_of_two(longest))
        values = np.asarray(self._network.predict_on_batch(x))
        is_token = x["response_mask"][:, :, 1:]
        return [v[mask] for v, mask in zip(values, is_token, strict=True)]


class _TokenLogProbs(keras.Model):
    """Compiles `SelfPlayModel.token_log_probs`."""

    def __init__(self, model: SelfPlayModel) -> None:
        # TensorFlow takes no underscore in front.
        super().__init__(name="token_log_probs")
        self.model = model
        self.built = True

    def call(self, inputs: dict[str, Any]) -> Any:
        """Log-probs of tokens."""
        return self.model.token_log_probs(inputs)
