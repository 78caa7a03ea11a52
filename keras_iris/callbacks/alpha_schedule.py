"""An order that depends on the step alone."""

import warnings
from typing import Any

import keras

from keras_iris.callbacks.self_play_callback import Logs
from keras_iris.losses.iris import check_alpha


class AlphaSchedule(keras.callbacks.Callback):
    """Sets `model.alpha` to `schedule(step)` before every batch.

    `step` is the optimizer's count of updates, so the schedule goes on where
    it was after a resume, and over the iterations of self-play.

    Args:
        schedule: A `keras.optimizers.schedules.LearningRateSchedule`, or any
            function of the step.

    Raises:
        ValueError: `schedule` isn't a function, or gives an order outside of
            [0, 100].

    Examples:
        ```python
        # Geometric annealing, from 2 to half of it every 1,000 steps.
        schedule = keras.optimizers.schedules.ExponentialDecay(2.0, 1000, 0.5)
        model.fit(pairs, callbacks=[AlphaSchedule(schedule)])
        ```

    Reference:
        IRIS, arXiv 2604.20933, for geometric annealing.
    """

    def __init__(
        self, schedule: keras.optimizers.schedules.LearningRateSchedule
    ) -> None:
        super().__init__()
        if not callable(schedule) or isinstance(schedule, type):
            raise ValueError(
                "`schedule` has to be a function of the step. Received: "
                f"{schedule!r}. A constant order needs no callback."
            )
        self.schedule = schedule

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"schedule": self.schedule}

    def on_train_begin(self, logs: Logs = None) -> None:
        """A `fit` starts."""
        warn_without_order(self)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Sets the order for the batch."""
        model = self.model
        step = keras.ops.cast(model.optimizer.iterations, "float32")
        alpha = self.schedule(step)
        if keras.ops.is_tensor(alpha) and tuple(alpha.shape) == ():
            alpha = float(keras.ops.convert_to_numpy(alpha))
        model.alpha.assign(check_alpha(alpha))


def warn_without_order(callback: keras.callbacks.Callback) -> None:
    """Says that a callback sets an order that the model's loss doesn't have."""
    loss, name = callback.model.loss, type(callback).__name__
    if not loss.has_order:
        warnings.warn(
            f"The loss {type(loss).__name__} has no order: {name} changes "
            "`model.alpha`, which the logs show, and not the training. Use "
            f"`keras_iris.losses.IRIS`, or leave {name} out.",
            stacklevel=3,
        )
