"""SIGTERM, which schedulers send before they end a job."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import keras

from keras_iris import backend
from keras_iris.callbacks.self_play_callback import Logs

# What a shell says of a process that SIGTERM has ended.
_EXIT_STATUS = 128 + signal.SIGTERM


class Termination:
    """Ends a run where SIGTERM asks for it, with all that is done on disk.

    Outside of a `fit` the program ends at once, as shards are whole or not
    there. Within one it ends after the step, with a checkpoint. Several
    processes don't see it at the same step: there, and in threads, SIGTERM is
    left as it is.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._is_in_fit = False

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """While it lasts, SIGTERM is waited for."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or backend.process_count() > 1:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def in_fit(self) -> Iterator[None]:
        """While it lasts, a step is not to be broken off."""
        self._is_in_fit = True
        try:
            yield
        finally:
            self._is_in_fit = False

    def check(self) -> None:
        """Ends the program if that was asked for.

        Raises:
            SystemExit: With status 143.
        """
        if self.is_asked:
            print("SIGTERM: what is done is on disk; `run` goes on from here.")
            raise SystemExit(_EXIT_STATUS)

    def _handle(self, number: int, frame: Any) -> None:
        self.is_asked = True
        if not self._is_in_fit:
            self.check()


class StopIfAsked(keras.callbacks.Callback):
    """Stops training after the step in which SIGTERM came.

    Args:
        termination: Of the run.
    """

    def __init__(self, termination: Termination) -> None:
        super().__init__()
        self.termination = termination

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Stops, which makes a checkpoint."""
        if self.termination.is_asked:
            self.model.stop_training = True
