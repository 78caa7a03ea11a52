"""The checkpoints of a run."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_iris.self_play.arrays import (
    Source,
    read_arrays,
    read_metadata,
    write_arrays,
)
from keras_iris.self_play.settings import finite

Position = dict[str, Any]

_NUM_STARTS = 2


class Checkpoints:
    """Weights, optimizer and position of a run, now and as iterations began.

        checkpoint.safetensors            within an iteration
        starts/iteration_002.safetensors  as an iteration began; the last two

    A position is `{"iteration", "epoch", "batch"}`, where to go on.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.within = folder / "checkpoint.safetensors"

    def start(self, iteration: int) -> Path:
        """The file of an iteration's start."""
        return self.folder / "starts" / f"iteration_{iteration:03d}.safetensors"

    def starts(self) -> list[Path]:
        """Files of the iterations' starts that are there, the latest first."""
        return sorted(
            self.folder.glob("starts/iteration_*.safetensors"),
            key=lambda file: int(file.stem.removeprefix("iteration_")),
            reverse=True,
        )

    def files(self) -> list[Path]:
        """All that are there; those of an iteration before its start."""
        within = [self.within] if self.within.exists() else []
        return within + self.starts()

    def save(
        self,
        variables: Sequence[keras.Variable],
        position: Position,
        **metadata: str,
    ) -> None:
        """Writes a checkpoint, and removes those that it makes useless.

        Where a value isn't finite, it raises and nothing is changed.
        """
        is_start = position["epoch"] == position["batch"] == 0
        file = self.start(position["iteration"]) if is_start else self.within
        write_variables(
            file, variables, {"position": json.dumps(position), **metadata}
        )
        if is_start:
            self.within.unlink(missing_ok=True)
            for old in self.starts()[_NUM_STARTS:]:
                old.unlink()

    def load(
        self, variables: Sequence[keras.Variable], *, is_back: bool = False
    ) -> Position | None:
        """Assigns the latest whole checkpoint; returns its position, if any.

        A damaged one is passed over, with a warning; where all are, or are of
        another model, it raises. With `is_back` it is that of an iteration's
        start, and a checkpoint within the iteration is removed.
        """
        files = self.starts() if is_back else self.files()
        errors = []
        for file in sorted(files, key=_progress, reverse=True):
            try:
                metadata = read_variables(file, variables)
            except ValueError as error:
                errors.append(str(error))
                continue
            if is_back:
                self.within.unlink(missing_ok=True)
            position: Position = json.loads(metadata["position"])
            for damage in errors:
                warnings.warn(
                    f"{damage}. The run goes back to iteration "
                    f"{position['iteration']}, epoch {position['epoch'] + 1}.",
                    stacklevel=2,
                )
            return position
        if errors:
            raise ValueError(
                f"{'; '.join(errors)}. Put back a whole checkpoint of this "
                "run, or pass another `run_dir`."
            )
        return None

    def weights(self) -> set[str]:
        """Hashes of the weights that the run has had, as far as known."""
        hashes = set()
        for file in [*self.files(), self.folder / "best.safetensors"]:
            try:
                hashes.add(read_metadata(file).get("weights", ""))
            except ValueError:
                continue
        return hashes - {""}


def write_variables(
    file: Path, variables: Sequence[keras.Variable], metadata: dict[str, str]
) -> None:
    """Writes variables to a file, whole or not at all."""

    def source(variable: keras.Variable) -> Source:
        return Source(
            tuple(variable.shape), variable.dtype, lambda: finite(variable)
        )

    arrays = {f"{i:05d}": source(v) for i, v in enumerate(variables)}
    write_arrays(file, arrays, metadata)


def read_variables(
    file: Path, variables: Sequence[keras.Variable]
) -> dict[str, str]:
    """Assigns what `write_variables` wrote; returns the metadata."""
    arrays, metadata = read_arrays(file)
    values = [array for _, array in sorted(arrays.items())]
    if [a.shape for a in values] != [tuple(v.shape) for v in variables]:
        raise ValueError(
            f"{file} holds {len(values)} variables of other shapes than the "
            f"{len(variables)} of this model and optimizer"
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return metadata


def _progress(file: Path) -> tuple[int, int, int]:
    """How far a run had come; a damaged file may be the latest."""
    try:
        position = json.loads(read_metadata(file)["position"])
    except (ValueError, KeyError):
        return (2**31, 0, 0)
    return position["iteration"], position["epoch"], position["batch"]
