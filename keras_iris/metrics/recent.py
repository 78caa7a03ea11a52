"""The log-probs of the latest batch, for callbacks to look at."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

Tensor = Any


class PairBatch(NamedTuple):
    """How a batch of pairs came out, in float64 NumPy.

    Attributes:
        opponent: Opponent log-probs, shape `(batch, 2)`, in nats.
        policy: Policy log-probs, shape `(batch, 2)`, in nats.
        num_tokens: Response tokens, shape `(batch, 2)`.
        sample_weight: Weights, shape `(batch,)`, all positive.
    """

    opponent: np.ndarray
    policy: np.ndarray
    num_tokens: np.ndarray
    sample_weight: np.ndarray

    @property
    def log_ratio(self) -> np.ndarray:
        """Policy minus opponent log-probs, shape `(batch, 2)`, in nats."""
        return self.policy - self.opponent


@keras.saving.register_keras_serializable(package="keras_iris")
class RecentLogProbs(keras.metrics.Metric):
    """Keeps the rows of the latest batch; adds nothing to the logs.

    Args:
        num_rows: Rows kept. Of a larger batch these are the last.
        name: Name of the metric.
    """

    def __init__(
        self, num_rows: int = 4096, *, name: str = "recent_log_probs"
    ) -> None:
        super().__init__(name=name, dtype="float32")
        self.num_rows = num_rows
        # opponent (2), policy (2), tokens (2), weight, number of the batch
        self.rows = self.add_variable((num_rows, 8), "zeros", name="rows")
        self.num_batches = self.add_variable((), "zeros", name="num_batches")

    def update_state(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        num_tokens: Tensor,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            y_true: Opponent log-probs, shape `(batch, 2)`, in nats.
            y_pred: Policy log-probs, shape `(batch, 2)`, in nats.
            num_tokens: Response tokens, shape `(batch, 2)`.
            sample_weight: Weights, shape `(batch,)`.
        """
        self.num_batches.assign_add(1.0)
        ones = ops.ones_like(ops.cast(num_tokens[:, :1], "float32"))
        if sample_weight is None:
            weight = ones
        else:
            weight = ops.reshape(ops.cast(sample_weight, "float32"), (-1, 1))
        columns = [y_true, y_pred, num_tokens, weight]
        columns = [ops.cast(column, "float32") for column in columns]
        new = ops.concatenate([*columns, ones * self.num_batches], axis=1)
        kept = ops.concatenate([self.rows.value, new], axis=0)
        self.rows.assign(kept[-self.num_rows :])

    def result(self) -> dict[str, Tensor]:
        """Nothing for the logs."""
        return {}

    def latest(self) -> PairBatch:
        """The latest batch; rows of weight 0 are left out."""
        rows = ops.convert_to_numpy(self.rows.value).astype("float64")
        rows = rows[(rows[:, 7] == rows[-1, 7]) & (rows[:, 6] > 0)]
        return PairBatch(rows[:, 0:2], rows[:, 2:4], rows[:, 4:6], rows[:, 6])

    def get_config(self) -> dict[str, Any]:
        """The metric's configuration."""
        return {"num_rows": self.num_rows, "name": self.name}
