"""The `fit` of an iteration, from wherever an earlier process left it."""

from collections.abc import Callable
from typing import Any

import keras

from keras_iris import backend
from keras_iris.data import PairDataset
from keras_iris.self_play.alarms import Alarms
from keras_iris.self_play.checkpoints import Position
from keras_iris.self_play.options import Options
from keras_iris.self_play.step_callbacks import (
    CheckpointWriter,
    Progress,
    ShortProgress,
    Steps,
)
from keras_iris.self_play.termination import StopIfAsked, Termination


class Training:
    """Trains on the pairs of an iteration.

    Args:
        options: Of the run, with model and callbacks.
        dataset: The pairs.
        position: Where to begin.
        log: Takes the kind of a line and its values.
        alarms: See every step.
        termination: Tells whether SIGTERM came.
        save: Writes a checkpoint of a position.
    """

    def __init__(  # noqa: PLR0913
        self,
        options: Options,
        dataset: PairDataset,
        position: Position,
        log: Callable[..., None],
        alarms: Alarms,
        termination: Termination,
        save: Callable[[Position], None],
    ) -> None:
        self.model = options.model
        self.position = position
        self.termination = termination
        self.progress = Progress(options, dataset, position["iteration"])
        self.steps = Steps(log, self.progress, alarms)
        # The checkpoint last: with all that the others have set.
        self.callbacks = [
            self.steps,
            ShortProgress(),
            *options.callbacks,
            StopIfAsked(termination),
            CheckpointWriter(save, self.progress),
        ]

    def run(self) -> bool:
        """Trains to the end of the iteration, or of an epoch that is the last.

        Returns:
            Whether it came there; false where a callback stops it at a batch.
        """
        here, epoch = self.progress, self.position["epoch"]
        here.first_batch = self.position["batch"]
        # To Keras each `fit` is the end of training, where averages of the
        # weights, if there are any, take their place.
        with self.model.finalizing_if(self._is_over):
            if here.first_batch:
                self._fit(_Rest(here.dataset, here.first_batch), epoch, 1)
                here.first_batch, epoch = 0, epoch + 1
                if self._is_over() or here.is_stopped:
                    return self._is_over()
            self._fit(here.dataset, epoch, here.options.epochs - epoch)
        return self._is_over()

    def _is_over(self) -> bool:
        here = self.progress
        is_ended = self.model.stop_training and not here.is_stopped
        return here.is_at_end or bool(is_ended)

    def _fit(
        self, batches: keras.utils.PyDataset, epoch: int, num_epochs: int
    ) -> None:
        here = self.progress
        here.epoch = here.dataset.epoch = epoch
        first = here.first_epoch + epoch
        try:
            with self.termination.in_fit():
                self.model.fit(
                    backend.dataset(batches, is_training=True),
                    shuffle=False,
                    initial_epoch=first,
                    epochs=first + num_epochs,
                    callbacks=self.callbacks,
                )
        except Exception as error:
            if _is_out_of_memory(error):
                raise MemoryError(self._what_to_do()) from error
            raise

    def _what_to_do(self) -> str:
        batch_size = self.progress.options.batch_size
        size = self.model.micro_batch_size
        smaller = (size or batch_size) // 2
        advice = (
            f"Compile the model with micro_batch_size={smaller}, which gives "
            "the same gradient"
            if smaller
            else "Load the model with remat=True, lora_rank= or quantize=, or "
            "cut the data to shorter responses"
        )
        return (
            f"A training step has run out of memory, with {batch_size=} and "
            f"micro_batch_size={size}. {advice}. The run goes on from its last "
            "checkpoint."
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is what one of the backends raises then."""
    names = ("OutOfMemoryError", "ResourceExhaustedError")
    texts = ("RESOURCE_EXHAUSTED", "can't allocate memory", "OOM when")
    is_named = type(error).__name__ in names
    return is_named or any(text in str(error) for text in texts)


class _Rest(keras.utils.PyDataset):
    """A data set without its first batches, which are done."""

    def __init__(self, dataset: PairDataset, first_batch: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.first_batch = first_batch
        self.bucket_lengths = dataset.bucket_lengths
        self.sequence_lengths = dataset.sequence_lengths
        self.batch_size = dataset.batch_size

    def __len__(self) -> int:
        return len(self.dataset) - self.first_batch

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index + self.first_batch]
