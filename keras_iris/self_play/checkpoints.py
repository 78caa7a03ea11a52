"""The checkpoints of a run."""

import json
import operator
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_iris import backend
from keras_iris.models import SelfPlayModel
from keras_iris.models.values import check_finite, finite
from keras_iris.self_play.arrays import (
    Source,
    read_arrays,
    read_metadata,
    write_arrays,
)
from keras_iris.self_play.processes import first_error, from_first, is_first

Position = dict[str, Any]

_NUM_STARTS = 2
_FILE = ".safetensors"  # the other ones are folders of Orbax
_START = r"iteration_\d+(\.safetensors)?"
_WITHIN = r"checkpoint(\.safetensors|-\d+-\d+-\d+)"
_UNFINISHED = r"\.orbax-checkpoint-tmp.*"  # of a process that was killed


class Checkpoints:
    """Weights, optimizer and position of a run, now and as iterations began.

        checkpoint.safetensors            within an iteration
        starts/iteration_002.safetensors  as an iteration began; the last two

    Under a `keras.distribution` over several devices they are folders of
    Orbax, `checkpoint-002-0-00017` and `starts/iteration_002`, to which each
    process writes what its devices hold. A run may go on under another
    distribution, or without one.

    A position is `{"iteration", "epoch", "batch"}`, where to go on.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._latest: Path | None = None

    def start(self, iteration: int) -> Path:
        """The file of an iteration's start."""
        return self.folder / "starts" / f"iteration_{iteration:03d}{_FILE}"

    def starts(self) -> list[Path]:
        """Those of the iterations' starts that are there, the latest first."""
        found = _named(self.folder / "starts", _START)
        return sorted(
            found,
            key=lambda file: int(file.stem.removeprefix("iteration_")),
            reverse=True,
        )

    def files(self) -> list[Path]:
        """All that are there; those of an iteration before its start."""
        return _named(self.folder, _WITHIN) + self.starts()

    def save(
        self,
        variables: Sequence[keras.Variable],
        position: Position,
        **metadata: str,
    ) -> None:
        """Writes a checkpoint, and removes those that it makes useless.

        Where a value isn't finite, it raises and nothing is changed. Orbax
        goes on writing after this returns: `wait`.
        """
        self.wait()
        is_start = position["epoch"] == position["batch"] == 0
        file = self.folder / f"checkpoint{_FILE}"
        if is_start:
            file = self.start(position["iteration"])
        metadata = {"position": json.dumps(position), **metadata}
        if backend.is_cut():
            for variable in variables:
                check_finite(variable)
            name = "checkpoint-{iteration:03d}-{epoch}-{batch:05d}"
            name = file.stem if is_start else name.format(**position)
            self._latest = file.with_name(name)
            self._orbax().save(self._latest, variables, metadata)
        else:
            write_variables(file, variables, metadata)
            self._latest = file
            self.wait()

    def wait(self) -> None:
        """Waits until the latest is on disk, and removes useless ones."""
        if self._latest is None:
            return
        if self._writer is not None:
            self._writer.wait()
        if is_first():
            useless = [*self.starts()[_NUM_STARTS:], *self._within()]
            useless += _named(self.folder / "starts", _START + _UNFINISHED)
            for old in set(useless) - {self._latest}:
                _remove(old)
        self._latest = None
        backend.exchange("")

    def load(
        self, variables: Sequence[keras.Variable], *, is_back: bool = False
    ) -> Position | None:
        """Assigns the latest whole checkpoint; returns its position, if any.

        A damaged one is passed over, with a warning; where all are, or are of
        another model, it raises. With `is_back` it is that of an iteration's
        start, and a checkpoint within the iteration is removed.
        """
        self.wait()

        def find() -> list[str]:
            files = self.starts() if is_back else self.files()
            return [str(f) for f in sorted(files, key=_progress, reverse=True)]

        errors: list[str] = []
        for file in map(Path, from_first(find)):
            error, metadata = "", {}
            try:
                metadata = self._read(file, variables)
            except ValueError as damage:
                error = str(damage)
            if error := first_error(error):
                errors.append(error)
                continue
            if is_back and is_first():
                for useless in self._within():
                    _remove(useless)
            position: Position = json.loads(metadata["position"])
            for damage_text in errors:
                warnings.warn(
                    f"{damage_text}. The run goes back to iteration "
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
                hashes.add(_metadata(file).get("weights", ""))
            except ValueError:
                continue
        return hashes - {""}

    def _within(self) -> list[Path]:
        """Checkpoints within an iteration, unfinished ones as well."""
        return _named(self.folder, f"{_WITHIN}({_UNFINISHED})?")

    def _read(
        self, file: Path, variables: Sequence[keras.Variable]
    ) -> dict[str, str]:
        if file.suffix == _FILE:
            return read_variables(file, variables)
        metadata = _metadata(file)
        self._orbax().load(file, variables)
        return metadata

    def _orbax(self) -> Any:
        if self._writer is None:
            self._writer = backend.sharded_checkpoints()
        return self._writer


def state_of(model: SelfPlayModel) -> list[keras.Variable]:
    """All that training changes; the optimizer has to be built."""
    own = ("alpha", "gap", "gap_sums", "seed_generator_state")
    return [
        *model.trainable_variables,
        *(v for v in model.non_trainable_variables if v.name in own),
        *model.optimizer.variables,
    ]


def write_variables(
    file: Path, variables: Sequence[keras.Variable], metadata: dict[str, str]
) -> None:
    """Writes variables to a file, whole or not at all; process 0 does."""

    def source(variable: keras.Variable) -> Source:
        return Source(
            tuple(variable.shape), variable.dtype, lambda: finite(variable)
        )

    if is_first():
        arrays = {f"{i:05d}": source(v) for i, v in enumerate(variables)}
        write_arrays(file, arrays, metadata)
    elif backend.IS_ONE_PROGRAM:
        for variable in variables:
            finite(variable)  # which process 0 reads of all devices


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


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix == _FILE:
        return read_metadata(file)
    try:
        content: dict[str, str] = json.loads(
            (file / "metadata" / "metadata").read_text()
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {error}") from error
    return content


def _named(folder: Path, pattern: str) -> list[Path]:
    """What a run has written there; copies by others stay theirs."""
    return [p for p in folder.glob("*") if re.fullmatch(pattern, p.name)]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _progress(file: Path) -> tuple[int, int, int]:
    """How far a run had come; a damaged file may be the latest."""
    try:
        position = json.loads(_metadata(file)["position"])
        places = map(position.__getitem__, ("iteration", "epoch", "batch"))
        iteration, epoch, batch = map(operator.index, places)
    except (AttributeError, KeyError, TypeError, ValueError):
        return (2**31, 0, 0)
    return iteration, epoch, batch
