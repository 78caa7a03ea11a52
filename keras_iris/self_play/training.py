"""The `fit` of an iteration, from wherever an earlier process left it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_iris import backend
from keras_iris.data import PairDataset
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.checkpoints import Position
from keras_iris.self_play.step_callbacks import (
    CheckpointWriter,
    EpochOrder,
    Progress,
    ShortProgress,
    StepLogger,
)


class Training:
    """Trains on the pairs of an iteration.

    Args:
        model: The model.
        dataset: The pairs.
        epochs: Epochs of an iteration.
        seed: Of the run.
        callbacks: The user's.
        log: Takes the kind of a line and its values.
        save: Writes a checkpoint of a position.
        every_steps: Most steps between checkpoints, or None.
        every_minutes: Longest time between them.
    """

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        model: SelfPlayModel,
        dataset: PairDataset,
        *,
        epochs: int,
        seed: int,
        callbacks: Sequence[keras.callbacks.Callback],
        log: Callable[..., None],
        save: Callable[[Position], None],
        every_steps: int | None,
        every_minutes: float,
    ) -> None:
        self.model = model
        self.save = save
        self.progress = Progress(epochs, dataset)
        self.logger = StepLogger(log, self.progress)
        keep = CheckpointWriter(
            save,
            self.progress,
            every_steps=every_steps,
            every_minutes=every_minutes,
        )
        # The checkpoint last: with all that the others have set.
        self.callbacks = [
            EpochOrder(self.progress, seed),
            self.logger,
            ShortProgress(),
            *callbacks,
            keep,
        ]

    def run(self, position: Position) -> bool:
        """Trains from a position to the end of the iteration.

        Args:
            position: Where to begin.

        Returns:
            Whether it came to the end, and no callback has stopped it.
        """
        here = self.progress
        here.start(position)
        epoch = position["epoch"]
        is_over = epoch == here.epochs
        if position["batch"]:
            # To Keras that is the end of training, where averages of the
            # weights, if there are any, take their place.
            with self.model.without_finalizing():
                self._fit(_Rest(here.dataset, position["batch"]), epoch + 1)
            is_over = self.model.stop_training or epoch + 1 == here.epochs
            if not is_over:
                here.start({**position, "epoch": epoch + 1, "batch": 0})
            elif here.is_at_end or not here.is_stopped:
                self.model.optimizer.finalize_variable_values(
                    self.model.trainable_variables
                )
        if not is_over:
            self._fit(here.dataset, here.epochs)
        if self.logger.num_steps and (here.is_at_end or not here.is_stopped):
            self.save({**position, "epoch": here.epochs, "batch": 0})
        return not here.is_stopped

    def _fit(self, batches: keras.utils.PyDataset, end: int) -> None:
        """Trains up to an epoch of the iteration."""
        here = self.progress
        self.model.fit(
            backend.dataset(batches),
            shuffle=False,
            initial_epoch=here.first_epoch + here.epoch,
            epochs=here.first_epoch + end,
            callbacks=self.callbacks,
        )


class _Rest(keras.utils.PyDataset):
    """A data set without its first batches, which are done."""

    def __init__(self, dataset: PairDataset, first_batch: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.first_batch = first_batch
        self.bucket_lengths = dataset.bucket_lengths

    def __len__(self) -> int:
        return len(self.dataset) - self.first_batch

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index + self.first_batch]
