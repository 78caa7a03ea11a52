"""What `fit` writes to the run's folder while it runs."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.metrics import step_values


def combine_seeds(*seeds: int) -> int:
    """One seed from several, different for all of them."""
    state = np.random.SeedSequence(seeds).generate_state(1)
    return int(state[0] >> 1)


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
        self._steps: list[dict[str, float]] = []

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
        values = {
            # That of the step: Keras' own log is a mean over the epoch.
            "loss": float(
                model.loss(
                    *(
                        value.astype("float32")
                        for value in (
                            latest.opponent,
                            latest.policy,
                            latest.sample_weight,
                        )
                    )
                )
            ),
            "alpha": alpha,
            **step_values(latest, alpha, 0.0),
        }
        self._steps.append(values)
        self.log(
            "step",
            iteration=self.iteration,
            step=int(model.optimizer.iterations.value),
            seconds=round(time.perf_counter() - self._start, 3),
            **values,
        )

    @property
    def num_steps(self) -> int:
        """Steps logged."""
        return len(self._steps)

    def means(self) -> dict[str, float]:
        """Means over the steps of what was logged; alpha is the last."""
        names = (
            "gap",
            "margin",
            "margin_accuracy",
            "real_ess",
            "synthetic_ess",
        )
        return {
            "alpha": self._steps[-1]["alpha"],
            **{
                name: float(np.mean([step[name] for step in self._steps]))
                for name in names
            },
        }


class StepSeeds(keras.callbacks.Callback):
    """Gives every step random numbers that don't depend on those before it.

    Args:
        seeds: What tells the epoch from others.
        first_batch: Batches of the epoch that were done before.
    """

    def __init__(self, seeds: Sequence[int], first_batch: int) -> None:
        super().__init__()
        self.seeds = seeds
        self.first_batch = first_batch

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Seeds the step."""
        backend.seed_step(combine_seeds(*self.seeds, self.first_batch + batch))


class CheckpointWriter(keras.callbacks.Callback):
    """Writes checkpoints in the middle of an epoch.

    Args:
        write: Takes the position in the run.
        position: Position of the epoch.
        first_batch: Batches of the epoch that were done before.
        every_steps: Most steps between checkpoints, or None.
        every_minutes: Longest time between them.
    """

    def __init__(
        self,
        write: Callable[[dict[str, Any]], None],
        position: dict[str, Any],
        *,
        first_batch: int,
        every_steps: int | None,
        every_minutes: float,
    ) -> None:
        super().__init__()
        self.write = write
        self.position = position
        self.first_batch = first_batch
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._written = time.monotonic()

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint when it is time."""
        num_done = self.first_batch + batch + 1
        is_step = self.every_steps and num_done % self.every_steps == 0
        minutes = (time.monotonic() - self._written) / 60
        if is_step or minutes >= self.every_minutes:
            _ = self.model  # fetches the state from the device
            self.write({**self.position, "batch": num_done})
            self._written = time.monotonic()
