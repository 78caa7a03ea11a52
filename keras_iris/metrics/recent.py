"""The log-probs of the latest batches, for callbacks to look at."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class RecentLogProbs(keras.metrics.Metric):
    """Keeps the rows of the latest batches; adds nothing to the logs.

    Args:
        num_rows: Rows kept. Of a larger batch these are the last.
        name: Name of the metric.
    """

    def __init__(
        self, num_rows: int = 4096, *, name: str = "recent_log_probs"
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.num_rows = num_rows
        # opponent (2), policy (2), tokens (2), weight, number of the batch,
        # its rows
        self.rows = self.add_variable((num_rows, 9), "zeros", name="rows")
        self.num_batches = self.add_variable((), "zeros", name="num_batches")
        # Alpha and gap of the model: on JAX, metrics see no variables but
        # their own.
        self.alpha = self.add_variable((), "ones", name="alpha")
        self.gap = self.add_variable((), "zeros", name="gap")

    def update_state(self, batch: PairBatch) -> None:
        """Adds a batch in float32 tensors."""
        self.num_batches.assign_add(1.0)
        weight = batch.sample_weight[:, None]
        ones = ops.ones_like(weight)
        columns = [batch.opponent, batch.policy, batch.num_tokens, weight]
        columns += [ones * self.num_batches, ones * ops.sum(ones)]
        new = ops.concatenate(columns, axis=1)
        kept = ops.concatenate([self.rows.value, new], axis=0)
        self.rows.assign(kept[-self.num_rows :])

    def result(self) -> dict[str, Tensor]:
        """Nothing for the logs."""
        return {}

    def latest(self) -> PairBatch:
        """The latest batch, in float64 NumPy; rows of weight 0 are left out."""
        rows = self._rows()
        return self._batch(rows[rows[:, 7] == rows[-1, 7]])

    def since(self, num_seen: int) -> list[PairBatch]:
        """The batches of this epoch but for the first ones.

        Args:
            num_seen: How many to leave out.

        Returns:
            Batches as `latest` gives them, the newest last. Those of which not
            all rows are kept are missing.
        """
        rows = self._rows()
        batches = []
        for number in np.arange(num_seen + 1, rows[-1, 7] + 1):
            batch = rows[rows[:, 7] == number]
            if len(batch) and len(batch) == batch[0, 8]:
                batches.append(self._batch(batch))
        return batches

    def _rows(self) -> np.ndarray:
        return ops.convert_to_numpy(self.rows.value).astype("float64")

    def _batch(self, rows: np.ndarray) -> PairBatch:
        rows = rows[rows[:, 6] > 0]
        alpha, gap = (
            float(ops.convert_to_numpy(v.value)) for v in (self.alpha, self.gap)
        )
        columns = rows[:, 0:2], rows[:, 2:4], rows[:, 4:6], rows[:, 6]
        return PairBatch(*columns, alpha, gap)

    def get_config(self) -> dict[str, Any]:
        """The metric's configuration."""
        return {"num_rows": self.num_rows, "name": self.name}
