"""What a run keeps on disk, and how it is found again."""

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_iris.files import remove_unfinished, replaced
from keras_iris.self_play.arrays import Arrays, read_arrays, write_arrays


class RunDir:
    """A run's folder.

        manifest.json             settings and versions
        metrics.jsonl             steps, iterations, evaluations
        checkpoint.safetensors    weights, optimizer, position in the run
        iteration_001/synthetic/  responses of the opponent, in shards
        iteration_001/opponent/   log-probs of the opponent, in shards

    Args:
        path: The folder; made where it isn't there.
        settings: All that decides how the run comes out, as strings and
            numbers.
        title: A line for the report.

    Raises:
        ValueError: The folder holds a run with other or unknown settings, or
            can't be written to.
    """

    def __init__(
        self, path: str | Path, settings: dict[str, Any], *, title: str
    ) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.manifest = self.path / "manifest.json"
        # As JSON gives them back.
        settings = json.loads(json.dumps(settings))
        self._settings, self._title = settings, title
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.manifest.exists():
                there = _read_settings(self.manifest)
                _check_settings(self.path, there, settings)
            elif self.checkpoint.exists():
                raise ValueError(
                    f"{self.path} holds a checkpoint without its manifest.json,"
                    " so its settings are unknown. Put the manifest back, or "
                    "pass another `run_dir`."
                )
            open(self.path / "metrics.jsonl", "a").close()
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ValueError(
                f"The run folder {self.path} can't be written to: {error}. "
                "Pass another `run_dir`."
            ) from error

    def write_manifest(self) -> None:
        """Writes down what the run is, where that isn't there yet."""
        remove_unfinished(self.path)
        if self.manifest.exists():
            return
        content = {
            "title": self._title,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": self._settings,
            "versions": versions(),
        }
        with replaced(self.manifest) as temporary:
            temporary.write_text(json.dumps(content, indent=2))

    def log(self, kind: str, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        line = json.dumps({"kind": kind, **values})
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(line + "\n")

    def log_scores(self, scores: Any, **where: float) -> dict[str, float]:
        """Appends a line of an evaluation.

        Args:
            scores: What `evaluate` returned.
            **where: The line's other values.

        Returns:
            The scores as numbers.

        Raises:
            ValueError: `scores` isn't a dictionary of numbers, or has a name
                that the line needs for something else.
        """
        try:
            numbers = {name: float(value) for name, value in scores.items()}
            self.log("evaluation", **where, **numbers)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "`evaluate` has to return a dictionary of numbers, of other "
                f"names than {sorted(['kind', *where])}. Received: {scores!r}"
            ) from error
        return numbers

    def shard(
        self, name: str, number: int, key: str, make: Callable[[], Arrays]
    ) -> Arrays:
        """Reads a shard, or makes and writes it.

        A shard that can't be read, or was made from something else, is made
        again, with a warning.

        Args:
            name: Folder of the shards, such as `"iteration_001/synthetic"`.
            number: The shard's number.
            key: Names all that the shard depends on.
            make: Makes the arrays.
        """
        path = self.path / name / f"{number:05d}.safetensors"
        if path.exists():
            try:
                arrays, metadata = read_arrays(path)
                if metadata.get("key") == key:
                    return arrays
                reason = "was made from other weights, settings or data"
            except ValueError as error:
                reason = str(error)
            warnings.warn(f"Making {path} again: {reason}", stacklevel=2)
        arrays = make()
        write_arrays(path, arrays, {"key": key})
        return arrays

    def write_checkpoint(
        self, variables: list[keras.Variable], position: dict[str, Any]
    ) -> None:
        """Replaces the checkpoint.

        Raises:
            FloatingPointError: A value isn't finite; the checkpoint stays.
        """
        arrays = {}
        for i, variable in enumerate(variables):
            value = keras.ops.convert_to_numpy(variable.value)
            if not np.isfinite(value).all():
                raise FloatingPointError(
                    f"{variable.path} is not finite. What {self.path} holds "
                    "is of before. Load the model again if it is new; else "
                    "lower the learning rate, clip gradients, or use a wider "
                    "dtype."
                )
            arrays[f"{i:05d}"] = value
        write_arrays(
            self.checkpoint, arrays, {"position": json.dumps(position)}
        )

    def read_checkpoint(
        self, variables: list[keras.Variable]
    ) -> dict[str, Any] | None:
        """Assigns the checkpoint's values; returns the position, if any."""
        if not self.checkpoint.exists():
            return None
        try:
            arrays, metadata = read_arrays(self.checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{error}. Put back a whole checkpoint, or remove the file: "
                "then the run starts again, with the weights the model has."
            ) from error
        shapes = [tuple(a.shape) for _, a in sorted(arrays.items())]
        if shapes != [tuple(variable.shape) for variable in variables]:
            raise ValueError(
                f"{self.checkpoint} holds {len(shapes)} variables of other "
                f"shapes than the {len(variables)} of this model and "
                "optimizer. Continue the run with the model it was started "
                "with, or pass another `run_dir`."
            )
        for variable, (_, array) in zip(
            variables, sorted(arrays.items()), strict=True
        ):
            variable.assign(array)
        return json.loads(metadata["position"])


def versions() -> dict[str, str]:
    """The backend and the versions of what a run depends on."""
    return {
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "numpy": np.__version__,
        "cpus": str(os.cpu_count()),
    }


def _read_settings(manifest: Path) -> dict[str, Any]:
    try:
        return json.loads(manifest.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{manifest} is not the manifest of a run ({error!r}). Put the "
            "right one back, or pass another `run_dir`."
        ) from error


def _check_settings(
    path: Path, old: dict[str, Any], new: dict[str, Any]
) -> None:
    names = sorted(old.keys() | new.keys())
    differences = [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in names
        if old.get(name) != new.get(name)
    ]
    if differences:
        lines = "\n".join(differences)
        raise ValueError(
            f"{path} holds a run with other settings:\n{lines}\n"
            "Continue it with its own settings, or pass another `run_dir`."
        )
