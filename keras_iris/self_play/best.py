"""The weights of a run that are best in a held-out score.

They are in `best.safetensors`, and so is which iteration's they are: nothing
else on disk says so.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris.metrics.score_mode import score_mode
from keras_iris.self_play.arrays import read_arrays, read_metadata
from keras_iris.self_play.checkpoints import read_variables, write_variables
from keras_iris.self_play.processes import from_first


class Best:
    """The best weights so far.

    Args:
        folder: The run's folder.
        score: Name of the score, None to keep nothing.
        score_modes: As in `SelfPlay`.
    """

    def __init__(
        self,
        folder: Path,
        score: str | None,
        score_modes: Mapping[str, str] | None,
    ) -> None:
        self.file = folder / "best.safetensors"
        self.score = score
        self.mode = score_mode(score or "", score_modes)

    def check(self) -> None:
        """Removes a damaged file, with a warning."""
        try:
            if self.file.exists():
                read_arrays(self.file)
        except ValueError as error:
            warnings.warn(
                f"{error}. It is removed, and the best weights from now on "
                "are kept.",
                stacklevel=2,
            )
            self.file.unlink()

    def keep(
        self,
        variables: Sequence[keras.Variable],
        iteration: int,
        scores: Mapping[str, float],
        get_hash: Callable[[], str],
    ) -> None:
        """Keeps the weights after an evaluation if they are the best so far.

        Args:
            variables: The trained weights.
            iteration: That was evaluated.
            scores: What came out.
            get_hash: Gives the hash of the weights.
        """
        if self.score is None:
            return
        if self.score not in scores:
            raise ValueError(
                f"keep_best={self.score!r} isn't a score of `evaluate`. "
                f"Received: {sorted(scores)}"
            )
        new = {
            "score": self.score,
            "mode": self.mode,
            "iteration": iteration,
            "value": scores[self.score],
        }
        if from_first(lambda: self._is_best(new)):
            metadata = {"best": json.dumps(new), "weights": get_hash()}
            write_variables(self.file, variables, metadata)

    def _is_best(self, new: dict[str, Any]) -> bool:
        if not np.isfinite(new["value"]):
            return False
        if not self.file.exists():
            return True
        old = self.read()
        if (old["score"], old["mode"]) != (new["score"], new["mode"]):
            return True
        sign = 1 if self.mode == "max" else -1
        return bool(sign * new["value"] > sign * old["value"])

    def read(
        self, variables: Sequence[keras.Variable] | None = None
    ) -> dict[str, Any]:
        """Whose weights are kept; assigns them to `variables`, if any."""
        if not self.file.exists():
            raise ValueError(
                f"{self.file} isn't there. Run with `keep_best`, the name of a "
                "score of `evaluate`."
            )
        if variables is None:
            return json.loads(read_metadata(self.file)["best"])
        return json.loads(read_variables(self.file, variables)["best"])
