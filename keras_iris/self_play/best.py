"""The best iteration of a run, by a held-out score."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris.evaluation import read_metrics, score_mode
from keras_iris.files import replaced
from keras_iris.self_play.checkpoints import read_variables, write_variables

_WEIGHTS = "best.safetensors"


def find_best(
    folder: Path, score: str, score_modes: Mapping[str, str]
) -> dict[str, Any]:
    """The best evaluation so far: see `SelfPlay.best`."""
    mode = score_mode(score, score_modes)
    values = {
        line["iteration"]: line[score]
        for line in read_metrics(folder)
        if line["kind"] == "evaluation" and np.isfinite(line.get(score, np.nan))
    }
    if mode is None or not values:
        raise ValueError(
            f"There is no finite score {score!r} whose mode is known in "
            f'{folder}. Expected one that `evaluate` gives, with "min" or '
            '"max" in `score_modes`.'
        )
    pick = min if mode == "min" else max
    iteration = pick(sorted(values), key=values.__getitem__)
    return {
        "score": score,
        "mode": mode,
        "iteration": iteration,
        "value": values[iteration],
    }


def keep_best(  # noqa: PLR0913 (by keyword only)
    folder: Path,
    variables: Sequence[keras.Variable],
    *,
    iteration: int,
    scores: Mapping[str, float],
    score: str,
    score_modes: Mapping[str, str],
    weights: str,
) -> None:
    """Keeps the weights after an evaluation if it is the best so far.

    Args:
        folder: The run's folder.
        variables: The trained weights.
        iteration: That was evaluated.
        scores: What came out.
        score: Name of the one that counts.
        score_modes: As in `SelfPlay`.
        weights: Hash of the weights.
    """
    if score not in scores:
        raise ValueError(
            f"keep_best={score!r} isn't a score of `evaluate`. Received: "
            f"{sorted(scores)}"
        )
    if not np.isfinite(scores[score]):
        return
    best = find_best(folder, score, score_modes)
    if best["iteration"] == iteration:
        metadata = {"best": json.dumps(best), "weights": weights}
        write_variables(folder / _WEIGHTS, variables, metadata)
        with replaced(folder / "best.json") as temporary:
            temporary.write_text(json.dumps(best))


def load_best(
    folder: Path, variables: Sequence[keras.Variable]
) -> dict[str, Any]:
    """Assigns the weights that are kept: see `SelfPlay.load_best`."""
    file = folder / _WEIGHTS
    if not file.exists():
        raise ValueError(
            f"{file} isn't there. Run with `keep_best`, the name of a score of "
            "`evaluate`."
        )
    return json.loads(read_variables(file, variables)["best"])
