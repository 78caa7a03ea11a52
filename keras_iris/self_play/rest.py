"""What is left of an epoch that a crash cut off."""

from typing import Any

import keras
import numpy as np

from keras_iris.data import PairDataset


class Rest(keras.utils.PyDataset):
    """A data set without its first batches.

    Args:
        dataset: All batches of the epoch.
        first_batch: Batches that were done before.
    """

    def __init__(self, dataset: PairDataset, first_batch: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.first_batch = first_batch
        self.bucket_lengths = dataset.bucket_lengths

    def __len__(self) -> int:
        """The number of batches that are left."""
        return len(self.dataset) - self.first_batch

    def __getitem__(self, index: int) -> Any:
        """A batch, counted from the first that is left."""
        return self.dataset[index + self.first_batch]

    def indices(self, index: int) -> np.ndarray:
        """The examples of a batch, as in `PairDataset.indices`."""
        return self.dataset.indices(index + self.first_batch)
