"""What a run does within `fit`."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.callbacks.self_play_callback import Logs
from keras_iris.data import PairDataset
from keras_iris.metrics.monitor import step_values
from keras_iris.self_play.alarms import Alarms
from keras_iris.self_play.checkpoints import Position
from keras_iris.self_play.options import Options
from keras_iris.self_play.seeds import combine_seeds
from keras_iris.self_play.weighted_rows import WeightedRows


@dataclass
class Progress:
    """How far the `fit` of an iteration is.

    Attributes:
        options: Of the run.
        dataset: The batches of an epoch.
        iteration: Number of the iteration.
        epoch: Epoch of the iteration, from 0.
        first_batch: Batches of the epoch that an earlier `fit` did.
        num_batches: Batches of the epoch that are done.
        is_stopped: Whether a callback has stopped training at a batch.
    """

    options: Options
    dataset: PairDataset
    iteration: int
    epoch: int = 0
    first_batch: int = 0
    num_batches: int = 0
    is_stopped: bool = False

    @property
    def is_whole_epoch(self) -> bool:
        """Whether all batches of the epoch are done."""
        return self.num_batches == len(self.dataset)

    @property
    def is_at_end(self) -> bool:
        """Whether all batches of the iteration are done."""
        return self.is_whole_epoch and self.epoch + 1 == self.options.epochs

    @property
    def position(self) -> Position:
        """Where to go on."""
        where = {"epoch": self.epoch, "batch": self.num_batches}
        if self.is_whole_epoch:
            where = {"epoch": self.epoch + 1, "batch": 0}
        return {"iteration": self.iteration, **where}

    @property
    def first_epoch(self) -> int:
        """The epoch of the whole run with which the iteration begins."""
        return (self.iteration - 1) * self.options.epochs

    def num_done(self, batch: int) -> int:
        """Batches of the epoch after Keras' number `batch`."""
        # The last execution of several steps may have fewer.
        return min(self.first_batch + batch + 1, len(self.dataset))


class Steps(keras.callbacks.Callback):
    """Begins every step in its order, and logs it: the first of callbacks.

    Neither the order of an epoch nor the random numbers of a step depend on
    what was before, so a resumed run has the same. Training stops where a
    log-prob isn't finite.

    Args:
        log: Takes the kind of line and its values.
        progress: How far the run is; the epoch is kept up to date.
        alarms: See every step.
    """

    def __init__(
        self, log: Callable[..., None], progress: Progress, alarms: Alarms
    ) -> None:
        super().__init__()
        self.log = log
        self.progress = progress
        self.alarms = alarms
        self.rows = WeightedRows()
        self.num_tokens = 0
        self._start = time.perf_counter()
        self._num_seen = 0
        self._num_steps = 0
        self._sums: Counter[str] = Counter()

    def on_train_begin(self, logs: Logs = None) -> None:
        """A `fit` starts."""
        self._num_seen = self.model.recent.num_batches

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Sets the order of the batches."""
        here = self.progress
        here.epoch = here.dataset.epoch = epoch - here.first_epoch
        here.num_batches = here.first_batch

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Seeds the step."""
        here = self.progress
        number = here.num_done(batch) - 1
        seeds = (here.options.seed, here.iteration, here.epoch, number)
        backend.seed_step(combine_seeds(*seeds))

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Logs the step, or the steps that Keras executed at once."""
        here = self.progress
        steps = self.model.recent.since(self._num_seen)
        self._num_seen += len(steps)
        first = here.num_done(batch) - len(steps)
        for number, pairs in enumerate(steps, first):
            epochs = here.first_epoch + here.epoch
            step = epochs * len(here.dataset) + number + 1
            indices = here.dataset.indices(number)
            indices = indices[indices >= 0]
            if not np.isfinite(pairs.policy).all():
                indices = indices // here.dataset.num_samples
                raise FloatingPointError(
                    "Training stopped: a log-prob of the batch with examples "
                    f"{np.unique(indices).tolist()} is not finite (step "
                    f"{step}). The checkpoint is older. Lower the learning "
                    "rate, clip gradients, or use a wider dtype."
                )
            self.num_tokens += int(pairs.num_tokens.sum())
            # Of the step: Keras' own logs are means over the epoch.
            arguments = (pairs.opponent, pairs.policy, pairs.sample_weight)
            loss = self.model.loss(*(a.astype("float32") for a in arguments))
            values = {"loss": float(loss), **step_values(pairs)}
            self._sums.update(values)
            self._num_steps += 1
            self.log(
                "step",
                iteration=here.iteration,
                step=step,
                seconds=round(time.perf_counter() - self._start, 3),
                **values,
            )
            self.alarms.watch(here.iteration, step, values)
            has_order = hasattr(self.model.loss, "alpha")
            if has_order and here.epoch + 1 == here.options.epochs:
                self.rows.add(indices, pairs)

    def means(self) -> dict[str, float]:
        """Means over the steps of what a person looks at first."""
        names = ("alpha", "gap", "margin", "real_ess", "synthetic_ess")
        number = self._num_steps
        return {n: self._sums[n] / number for n in names if number}


class ShortProgress(keras.callbacks.ProgbarLogger):
    """Keras' progress bar with what fits into a line."""

    _NAMES = ("loss", "alpha", "gap", "margin", "real_nll")

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Moves the bar on."""
        super().on_train_batch_end(batch, self._short(logs))

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Ends the bar."""
        super().on_epoch_end(epoch, self._short(logs))

    def _short(self, logs: Logs) -> dict[str, Any]:
        logs = logs or {}
        return {name: logs[name] for name in self._NAMES if name in logs}


class CheckpointWriter(keras.callbacks.Callback):
    """Writes checkpoints within an iteration: the last of all callbacks.

    Args:
        save: Takes the position in the run.
        progress: How far the run is.
    """

    def __init__(
        self, save: Callable[[Position], None], progress: Progress
    ) -> None:
        super().__init__()
        self.save = save
        self.progress = progress
        self._saved = time.monotonic()
        self._rates: list[tuple[keras.Variable, Any]] = []

    def on_train_begin(self, logs: Logs = None) -> None:
        """Remembers the learning rate, that of the checkpoint."""
        self._rates = [
            (variable, keras.ops.convert_to_numpy(variable))
            for variable in self.model.optimizer.variables
            if variable.name == "learning_rate"
        ]

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """In the rest of an epoch the rate is what it was.

        `LearningRateScheduler` has set it where the epoch began, and Keras
        calls it again.
        """
        if self.progress.first_batch:
            for variable, rate in self._rates:
                variable.assign(rate)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Writes a checkpoint when it is time, or a callback has stopped."""
        here, options = self.progress, self.progress.options
        before, here.num_batches = here.num_batches, here.num_done(batch)
        here.is_stopped = bool(self.model.stop_training)
        every = options.checkpoint_every_steps or len(here.dataset)
        minutes = (time.monotonic() - self._saved) / 60
        is_time = (
            here.is_stopped
            or minutes >= options.checkpoint_every_minutes
            or here.num_batches // every > before // every
        )
        # After the last batch, `on_epoch_end` writes.
        if is_time and not here.is_whole_epoch:
            self._save()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Writes a checkpoint, but where the iteration is over.

        Keras and the other callbacks aren't done there.
        """
        here = self.progress
        is_over = self.model.stop_training and not here.is_stopped
        if here.is_whole_epoch and not here.is_at_end and not is_over:
            self._save()

    def _save(self) -> None:
        self.save(self.progress.position)
        self._saved = time.monotonic()
