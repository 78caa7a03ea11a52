"""What a run keeps on disk, and how it is found again."""

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keras_iris.files import locked, remove_unfinished, replaced
from keras_iris.self_play.arrays import (
    Arrays,
    read_arrays,
    read_metadata,
    write_arrays,
)
from keras_iris.self_play.checkpoints import Checkpoints

Manifest = dict[str, Any]


class LostShard(ValueError):
    """A shard is gone, and the weights that made it aren't those in memory."""


class RunDir:
    """A run's folder.

        manifest.json             what the run is
        metrics.jsonl             steps, iterations, evaluations
        checkpoint.safetensors    weights, optimizer, position in the run
        starts/                   the same as the last two iterations began
        best.safetensors          weights of the best iteration, if kept
        iteration_001/synthetic/  responses of the opponent, in shards
        iteration_001/opponent/   log-probs of the opponent, in shards

    It is made where it isn't there; one that can't be written to is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.manifest = self.path / "manifest.json"
        self.checkpoints = Checkpoints(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            open(self.path / "metrics.jsonl", "a").close()
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ValueError(
                f"The run folder {self.path} can't be written to: {error}. "
                "Pass another `run_dir`."
            ) from error

    def is_new(self) -> bool:
        """Whether no run has begun here."""
        return not (self.manifest.exists() or self.checkpoints.files())

    def join(self, new: Manifest) -> Manifest:
        """The manifest with which a run may go on here.

        Args:
            new: With `settings`, which make the run's result and can't be
                others than before, `execution`, how it is carried out, and
                `versions`; numbers and strings by name in each.

        Raises:
            ValueError: The folder holds a run with other or unknown settings
                or weights, or with more iterations.
        """
        new = json.loads(json.dumps(new))
        if self.is_new():
            return new
        if not self.manifest.exists():
            raise ValueError(
                f"{self.path} holds a checkpoint without its manifest.json,"
                " so its settings are unknown. Put the manifest back, or "
                "pass another `run_dir`."
            )
        old = _read_manifest(self.manifest)
        # Training changes weights and learning rate: those of a checkpoint,
        # and as a run has left its model, are this run's as well.
        left, settings = old.get("left", {}), new["settings"]
        for name, value in settings.items():
            is_known = name == "weights" and value in self.checkpoints.weights()
            if is_known or (name in left and left[name] == value):
                settings[name] = old["settings"].get(name)
        differences = _differences(old["settings"], settings)
        there, here = (m["execution"]["iterations"] for m in (old, new))
        if here < there:
            differences.append(
                f"iterations: {there} there, {here} here; more can be added"
            )
        if differences:
            lines = "\n".join(f"  {line}" for line in differences)
            raise ValueError(
                f"{self.path} holds a run with other settings:\n{lines}\n"
                "Continue it with its own settings and the model it started "
                "from, or pass another `run_dir`."
            )
        parts = ("execution", "versions")
        changed = {part: old[part] for part in parts if old[part] != new[part]}
        earlier = [*old.get("earlier", []), *([changed] if changed else [])]
        return {**new, "created": old.get("created"), "earlier": earlier}

    @contextmanager
    def open(self, describe: Callable[[], Manifest]) -> Iterator[None]:
        """Holds the folder for this process, and tells of the run in it.

        Args:
            describe: What the run is at that moment, as in `join`.

        Raises:
            ValueError: Another process holds it, or as in `join`.
        """
        with locked(self.path):
            manifest = self.join(describe())
            if self.manifest.exists():
                self._warn_of_versions(manifest["versions"])
            shards = self.path.glob("iteration_*/*")
            for folder in (self.path, self.path / "starts", *shards):
                remove_unfinished(folder)
            self._write(manifest)
            try:
                yield
            finally:
                self._write(manifest | {"left": _left(manifest, describe)})

    def _warn_of_versions(self, here: dict[str, Any]) -> None:
        there = _read_manifest(self.manifest)["versions"]
        for line in _differences(there, here):
            warnings.warn(
                f"The run in {self.path} goes on with another version, {line}: "
                "it may not end in the same weights.",
                stacklevel=5,
            )

    def _write(self, manifest: Manifest) -> None:
        with replaced(self.manifest) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2))

    def log(self, kind: str, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        line = json.dumps({"kind": kind, **values})
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(line + "\n")

    def log_scores(self, scores: Any, **where: float) -> dict[str, float]:
        """Appends a line of what `evaluate` returned; gives it as numbers."""
        try:
            numbers = {name: float(value) for name, value in scores.items()}
            self.log("evaluation", **where, **numbers)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "`evaluate` has to return a dictionary of numbers, of other "
                f"names than {sorted(['kind', *where])}. Received: {scores!r}"
            ) from error
        return numbers

    def shard_size(self, name: str, key: str) -> int | None:
        """How many responses the shards have that are there, as in `shard`."""
        for file in sorted((self.path / name).glob("*.safetensors")):
            try:
                metadata = read_metadata(file)
            except ValueError:
                continue  # `shard` tells of it
            if metadata.get("key") == key and "shard_size" in metadata:
                return int(metadata["shard_size"])
        return None

    def has_shard(self, name: str, number: int) -> bool:
        """Whether there is a file of a shard, which may be another key's."""
        return self._shard_path(name, number).exists()

    def shard(
        self,
        name: str,
        number: int,
        *,
        key: str,
        size: int,
        make: Callable[[], Arrays] | None,
    ) -> Arrays:
        """Reads a shard, or makes and writes it.

        A shard that can't be read, or was made from something else, is made
        again, with a warning.

        Args:
            name: Folder of the shards, such as `"iteration_001/synthetic"`.
            number: The shard's number.
            key: Names all that the shard depends on.
            size: Responses of a shard.
            make: Makes the arrays; None where nothing can any more.

        Raises:
            LostShard: The shard isn't there, and can't be made again.
        """
        path = self._shard_path(name, number)
        reason = f"{path} isn't there"
        if path.exists():
            try:
                arrays, metadata = read_arrays(path)
                if metadata.get("key") == key:
                    return arrays
                reason = f"{path} was made from other weights, settings or data"
            except ValueError as error:
                reason = str(error)
            if make is not None:
                warnings.warn(f"{reason}. It is made again.", stacklevel=2)
        if make is None:
            raise LostShard(
                f"{reason}, and the weights that made it have been trained "
                "since. Put the file back, or start again with another "
                "`run_dir`."
            )
        arrays = make()
        write_arrays(path, arrays, {"key": key, "shard_size": str(size)})
        return arrays

    def _shard_path(self, name: str, number: int) -> Path:
        return self.path / name / f"{number:05d}.safetensors"


def _read_manifest(file: Path) -> Manifest:
    try:
        content: Manifest = json.loads(file.read_text(encoding="utf-8"))
        for part in ("settings", "execution", "versions"):
            content[part].items()
        content["execution"]["iterations"] + 0
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not the manifest of a run ({error!r}). Put the "
            "right one back, or pass another `run_dir`."
        ) from error


def _left(
    manifest: Manifest, describe: Callable[[], Manifest]
) -> dict[str, Any]:
    """The settings of a model that its run has changed."""
    try:
        now = json.loads(json.dumps(describe()["settings"]))
    except Exception:  # an interrupt or a NaN left no whole weights
        return {}
    there = manifest["settings"]
    return {name: v for name, v in now.items() if v != there.get(name)}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
