"""The share of a process in batches that are of all."""

from typing import Any

import keras

from keras_iris.arguments import check_shared


class LocalRows(keras.utils.PyDataset):
    """Some rows of each batch.

    Args:
        batches: A data set of whole batches, the same in every process.
        num_shares: Parts that each batch is cut in.
        share: The part to take, from 0 on.

    Attributes:
        whole_batch_size: Rows of a batch before it is cut.
    """

    def __init__(self, batches: Any, num_shares: int, share: int) -> None:
        super().__init__()
        self.batches = batches
        self.num_shares = num_shares
        self.share = share
        self.whole_batch_size = check_shared(
            "batch_size", batches.batch_size, num_shares
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        size = self.whole_batch_size // self.num_shares
        rows = slice(self.share * size, (self.share + 1) * size)
        return keras.tree.map_structure(lambda a: a[rows], self.batches[index])

    @property
    def sequence_lengths(self) -> frozenset[int]:
        """As `PairDataset.sequence_lengths`."""
        return self.batches.sequence_lengths
