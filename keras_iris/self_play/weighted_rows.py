"""The responses that count most and least in the gradient of IRIS."""

import heapq
from typing import Any

import keras
import numpy as np

from keras_iris.data import PairDataset
from keras_iris.losses import tilted_weights
from keras_iris.metrics import PairBatch

_COLUMNS = ("annotated", "synthetic")


class WeightedRows:
    """Keeps the pairs of the largest and of the smallest weights.

    A weight is that of a response in the tilted risk of its batch, 1 if all
    count alike.

    Args:
        number: How many of each to keep.
    """

    def __init__(self, number: int = 3) -> None:
        self.number = number
        self._found: dict[str, list[tuple[float, int]]] = {
            column: [] for column in _COLUMNS
        }

    def add(self, indices: np.ndarray, pairs: PairBatch) -> None:
        """A batch of the last epoch of an iteration.

        Args:
            indices: The number of each pair, shape `(batch,)`.
            pairs: The batch, in NumPy.
        """
        alpha = float(pairs.alpha)
        real, synthetic = pairs.log_ratio.T
        for column, values, tilt in (
            ("annotated", -real, 1 - alpha),
            ("synthetic", synthetic, alpha),
        ):
            # Of a GPU's tensor NumPy makes no array.
            weights = keras.ops.convert_to_numpy(
                tilted_weights(values, tilt, pairs.sample_weight)
            )
            share = pairs.sample_weight / pairs.sample_weight.sum()
            weights = (weights / share).tolist()
            found = self._found[column]
            found += zip(weights, indices.tolist(), strict=True)
            # The largest first; of the others only the smallest are kept.
            largest = heapq.nlargest(self.number, found)
            smallest = heapq.nsmallest(self.number, found)
            self._found[column] = sorted({*largest, *smallest}, reverse=True)

    def lines(
        self, dataset: PairDataset, tokenizer: Any
    ) -> list[dict[str, Any]]:
        """What to show of them: weight, texts of prompt and response.

        Args:
            dataset: With the pairs.
            tokenizer: Makes texts of ids.
        """
        return [
            {
                "column": column,
                "weight": weight,
                "prompt": tokenizer.decode(example.prompt_ids.tolist()),
                "response": tokenizer.decode(np.asarray(ids).tolist()),
            }
            for column, found in self._found.items()
            # At order 1 all annotated responses count alike.
            if found and found[0][0] - found[-1][0] > 1e-3
            for weight, index in found
            for example in [dataset.examples[index // dataset.num_samples]]
            for ids in [
                example.response_ids
                if column == "annotated"
                else dataset.synthetic[index]
            ]
        ]
