"""What a run does within `fit`."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.data import PairDataset
from keras_iris.metrics import step_values
from keras_iris.self_play.checkpoints import Position
from keras_iris.self_play.seeds import combine_seeds


@dataclass
class Progress:
    """How far the `fit` of an iteration is.

    Attributes:
        epochs: Epochs of an iteration.
        dataset: The batches of an epoch.
        iteration: Number of the iteration.
        epoch: Epoch of the iteration, from 0.
        first_batch: Batches of the epoch that an earlier process did.
        num_batches: Batches of the epoch that are done.
        is_stopped: Whether a callback has stopped training at a batch.
    """

    epochs: int
    dataset: PairDataset
    iteration: int = 1
    epoch: int = 0
    first_batch: int = 0
    num_batches: int = 0
    is_stopped: bool = False

    def start(self, position: Position) -> None:
        """Goes to where a `fit` begins."""
        self.iteration = position["iteration"]
        self.epoch = self.dataset.epoch = position["epoch"]
        self.first_batch = position["batch"]

    @property
    def is_at_end(self) -> bool:
        """Whether all batches of the iteration are done."""
        is_last = self.epoch + 1 == self.epochs
        return is_last and self.num_batches == len(self.dataset)

    @property
    def first_epoch(self) -> int:
        """The epoch of the whole run with which the iteration begins."""
        return (self.iteration - 1) * self.epochs

    def num_done(self, batch: int) -> int:
        """Batches of the epoch after Keras' number `batch`."""
        # The last execution of several steps may have fewer.
        return min(self.first_batch + batch + 1, len(self.dataset))

    def step(self, batch: int) -> int:
        """Batches of the whole run after Keras' number `batch`."""
        epochs = self.first_epoch + self.epoch
        return epochs * len(self.dataset) + self.num_done(batch)


class EpochOrder(keras.callbacks.Callback):
    """Sets the order of each epoch and the random numbers of each step.

    Neither depends on what was before, so a resumed run has the same.

    Args:
        progress: Of which the epoch is kept up to date.
        seed: Of the run.
    """

    def __init__(self, progress: Progress, seed: int) -> None:
        super().__init__()
        self.progress = progress
        self.seed = seed

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Sets the order of the batches."""
        here = self.progress
        here.epoch = here.dataset.epoch = epoch - here.first_epoch
        here.num_batches = here.first_batch

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Seeds the step."""
        here = self.progress
        number = here.num_done(batch) - 1
        backend.seed_step(
            combine_seeds(self.seed, here.iteration, here.epoch, number)
        )


class StepLogger(keras.callbacks.Callback):
    """Logs every step; stops where a log-prob isn't finite.

    Args:
        log: Takes the kind of line and its values.
        progress: How far the run is.
    """

    def __init__(self, log: Callable[..., None], progress: Progress) -> None:
        super().__init__()
        self.log = log
        self.progress = progress
        self.num_tokens = 0
        self._start = time.perf_counter()
        self._num_seen = 0
        self._steps: list[dict[str, float]] = []

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Batches count from 0 again."""
        self._num_seen = 0

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Logs the step, or the steps that Keras executed at once."""
        model = self.model
        for pairs in model.recent.since(self._num_seen):
            number = self._num_seen
            self._num_seen += 1
            step = self.progress.step(number)
            if not np.isfinite(pairs.policy).all():
                indices = self.progress.dataset.indices(
                    self.progress.num_done(number) - 1
                )
                raise FloatingPointError(
                    "Training stopped: a log-prob of the batch with examples "
                    f"{indices[indices >= 0].tolist()} is not finite (step "
                    f"{step}). The checkpoint is of before. Lower the learning "
                    "rate, clip gradients, or use a wider dtype."
                )
            self.num_tokens += int(pairs.num_tokens.sum())
            # Of the step: Keras' own logs are means over the epoch.
            arguments = (pairs.opponent, pairs.policy, pairs.sample_weight)
            loss = model.loss(*(a.astype("float32") for a in arguments))
            values = {"loss": float(loss), **step_values(pairs)}
            self._steps.append(values)
            self.log(
                "step",
                iteration=self.progress.iteration,
                step=step,
                seconds=round(time.perf_counter() - self._start, 3),
                **values,
            )

    @property
    def num_steps(self) -> int:
        """Steps logged."""
        return len(self._steps)

    def means(self) -> dict[str, float]:
        """Means over the steps of what a person looks at first."""
        names = ("alpha", "gap", "margin", "real_ess", "synthetic_ess")
        return {
            name: float(np.mean([step[name] for step in self._steps]))
            for name in names
            if self._steps
        }


class ShortProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with what fits into a line."""

    _NAMES = ("loss", "alpha", "gap", "margin", "real_nll")

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Moves the bar on."""
        super().on_train_batch_end(batch, self._short(logs))

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Ends the bar."""
        super().on_epoch_end(epoch, self._short(logs))

    def _short(self, logs: dict[str, Any] | None) -> dict[str, Any]:
        logs = logs or {}
        return {name: logs[name] for name in self._NAMES if name in logs}


class CheckpointWriter(keras.callbacks.Callback):
    """Writes checkpoints within an iteration: the last of all callbacks.

    Args:
        save: Takes the position in the run.
        progress: How far the run is.
        every_steps: Most steps between checkpoints, or None.
        every_minutes: Longest time between them.
    """

    def __init__(
        self,
        save: Callable[[Position], None],
        progress: Progress,
        *,
        every_steps: int | None,
        every_minutes: float,
    ) -> None:
        super().__init__()
        self.save = save
        self.progress = progress
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint when it is time, or a callback has stopped."""
        here = self.progress
        before, here.num_batches = here.num_batches, here.num_done(batch)
        here.is_stopped = bool(self.model.stop_training)
        every = self.every_steps or len(here.dataset)
        minutes = (time.monotonic() - self._saved) / 60
        is_time = (
            here.is_stopped
            or minutes >= self.every_minutes
            or here.num_batches // every > before // every
        )
        # After the last batch, `on_epoch_end` writes.
        if is_time and here.num_batches < len(here.dataset):
            self._save({"epoch": here.epoch, "batch": here.num_batches})

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint, but where `fit` ends: Keras isn't done there."""
        here = self.progress
        is_over = self.model.stop_training and not here.is_stopped
        is_whole = here.num_batches == len(here.dataset)
        if is_whole and not here.is_at_end and not is_over:
            self._save({"epoch": here.epoch + 1, "batch": 0})

    def _save(self, position: Position) -> None:
        self.save({"iteration": self.progress.iteration, **position})
        self._saved = time.monotonic()
