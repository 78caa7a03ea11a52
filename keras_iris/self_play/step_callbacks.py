"""What `fit` writes to the run's folder while it runs."""

import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_iris.metrics import summary


class StepLogger(keras.callbacks.Callback):
    """Logs every step; stops where a log-prob isn't finite.

    Args:
        log: Takes the kind of line and its values.
        iteration: Number of the iteration.
        indices: Gives the examples of a batch.
    """

    def __init__(
        self,
        log: Callable[..., None],
        iteration: int,
        indices: Callable[[int], np.ndarray],
    ) -> None:
        super().__init__()
        self.log = log
        self.iteration = iteration
        self.indices = indices
        self.num_tokens = 0
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Logs the step."""
        model = self.model
        latest = model.recent.latest()
        if not np.isfinite(latest.policy).all():
            indices = self.indices(batch)
            raise FloatingPointError(
                "Training stopped: a log-prob of the batch with examples "
                f"{indices[indices >= 0].tolist()} is not finite (step "
                f"{int(model.optimizer.iterations.value)}). The checkpoint "
                "is of before. Lower the learning rate, clip gradients, or "
                "use a wider dtype."
            )
        alpha = float(model.alpha.value)
        self.num_tokens += int(latest.num_tokens.sum())
        self.log(
            "step",
            iteration=self.iteration,
            step=int(model.optimizer.iterations.value),
            seconds=round(time.perf_counter() - self._start, 3),
            loss=float(logs["loss"]) if logs else float("nan"),
            alpha=alpha,
            **summary(latest, alpha),
        )


class CheckpointWriter(keras.callbacks.Callback):
    """Writes a checkpoint every few steps of an epoch.

    Args:
        write: Takes the position in the run.
        position: Position of the epoch.
        first_batch: Batches of the epoch that were done before.
        every: Steps between checkpoints.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        position: dict[str, Any],
        *,
        first_batch: int,
        every: int,
    ) -> None:
        super().__init__()
        self.write = write
        self.position = position
        self.first_batch = first_batch
        self.every = every

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint when it is time."""
        num_done = self.first_batch + batch + 1
        if num_done % self.every == 0:
            _ = self.model  # fetches the state from the device
            self.write({**self.position, "batch": num_done})
