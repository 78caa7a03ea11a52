"""The one hook of self-play beyond those of Keras."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_iris.metrics import PairBatch

Logs = dict[str, Any] | None


class SelfPlayCallback(keras.callbacks.Callback):
    """A Keras callback that is also told of the phases of an iteration.

    `keras_iris.SelfPlay` calls these methods around the iteration's `fit`, in
    which all methods of `keras.callbacks.Callback` work as ever. A run that
    goes on in the middle of a `fit` calls `on_iteration_begin`, and
    `on_iteration_end` when it is done, but not the two between, which were
    called before it was cut off.

    A callback with arguments that change the result tells what they are by a
    method `get_config`: then a run doesn't go on with others.

    Examples:
        ```python
        class Announce(keras_iris.callbacks.SelfPlayCallback):
            def on_generate_end(self, iteration, responses, logs=None):
                print(iteration, "first answer:", responses[0])
        ```
    """

    def on_iteration_begin(self, iteration: int, logs: Logs = None) -> None:
        """Called before anything of an iteration.

        Args:
            iteration: Its number, from 1.
            logs: Empty.
        """

    def on_generate_end(
        self,
        iteration: int,
        responses: Sequence[np.ndarray],
        logs: Logs = None,
    ) -> None:
        """Called when all prompts are answered.

        Args:
            iteration: Number of the iteration.
            responses: Token ids of the answers to the first prompt,
                `num_samples` of them, then of those to the next.
            logs: `generate_seconds` and `generated_tokens`.
        """

    def on_score_end(
        self,
        iteration: int,
        pairs: PairBatch,
        logs: Logs = None,
    ) -> None:
        """Called when the opponent's log-probs are there, before `fit`.

        Args:
            iteration: Number of the iteration.
            pairs: All pairs of the iteration. The policy still is the
                opponent.
            logs: `score_seconds`.
        """

    def on_iteration_end(self, iteration: int, logs: Logs = None) -> None:
        """Called after `fit` and the evaluation on held-out data.

        Args:
            iteration: Number of the iteration.
            logs: The held-out scores and what the phases took.
        """

    def on_run_end(self, logs: Logs = None) -> None:
        """Called when `run` ends, by an error or an interrupt, too.

        Args:
            logs: Empty.
        """
