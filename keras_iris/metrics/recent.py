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

    Resetting, which Keras does at each epoch and in each `evaluate`, leaves
    them as they are.

    Args:
        num_rows: Rows kept. Of a larger batch these are the last.
        name: Name of the metric.
    """

    def __init__(
        self, num_rows: int = 4096, *, name: str = "recent_log_probs"
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.num_rows = num_rows
        # opponent (2), policy (2), tokens (2), weight; and of the batch: the
        # norm of its gradient, its rows
        self.rows = self._keep((num_rows, 9), "zeros", "rows")
        self.count = self._keep((), "zeros", "count", "int")
        # Alpha and gap of the model: on JAX, metrics see no variables but
        # their own.
        self.alpha = self._keep((), "ones", "alpha")
        self.gap = self._keep((), "zeros", "gap")
        # Of the latest step, which sets it.
        self.gradient_norm = self._keep((), "zeros", "gradient_norm")
        self.num_samples = 1  # of `PairBatch`

    def _keep(
        self,
        shape: tuple[int, ...],
        initializer: str,
        name: str,
        dtype: str | None = None,
    ) -> keras.Variable:
        # Replicas of TensorFlow all see the whole batch.
        return self.add_variable(
            shape,
            initializer,
            dtype=dtype,
            aggregation="only_first_replica",
            name=name,
        )

    def update_state(self, batch: PairBatch) -> None:
        """Adds a batch in float32 tensors."""
        self.count.assign_add(1)
        weight = batch.sample_weight[:, None]
        ones = ops.ones_like(weight)
        columns = [batch.opponent, batch.policy, batch.num_tokens, weight]
        scalars = [ones * batch.gradient_norm, ones * ops.sum(ones)]
        new = ops.concatenate([*columns, *scalars], axis=1)
        kept = ops.concatenate([self.rows.value, new], axis=0)
        self.rows.assign(kept[-self.num_rows :])

    def reset_state(self) -> None:
        """Does nothing."""

    def result(self) -> dict[str, Tensor]:
        """Nothing for the logs."""
        return {}

    @property
    def num_batches(self) -> int:
        """How many batches there have been."""
        return int(ops.convert_to_numpy(self.count))

    def latest(self) -> PairBatch:
        """The latest batch, in float64 NumPy; rows of weight 0 are left out."""
        return self.since(self.num_batches - 1)[0]

    def since(self, num_seen: int) -> list[PairBatch]:
        """The batches but for the first ones.

        Args:
            num_seen: How many to leave out.

        Returns:
            Batches as `latest` gives them, the newest last.

        Raises:
            ValueError: Not all their rows are kept.
        """
        rows = ops.convert_to_numpy(self.rows).astype("float64")
        batches: list[PairBatch] = []
        for _ in range(self.num_batches - num_seen):
            size = int(rows[-1, 8]) if len(rows) else 0
            if not 0 < size <= len(rows):
                raise ValueError(
                    f"The log-probs of {self.num_rows} pairs are kept, and "
                    "the latest batches have more. Expected batch_size * "
                    f"steps_per_execution to be {self.num_rows} at most."
                )
            rows, batch = np.split(rows, [len(rows) - size])
            batches.insert(0, self._batch(batch))
        return batches

    def _batch(self, rows: np.ndarray) -> PairBatch:
        norm = float(rows[-1, 7])
        rows = rows[rows[:, 6] > 0]
        alpha, gap = (
            float(ops.convert_to_numpy(v)) for v in (self.alpha, self.gap)
        )
        columns = rows[:, 0:2], rows[:, 2:4], rows[:, 4:6], rows[:, 6]
        return PairBatch(*columns, alpha, gap, self.num_samples, norm)

    def get_config(self) -> dict[str, Any]:
        """The metric's configuration."""
        return {"num_rows": self.num_rows, "name": self.name}
