"""What a run keeps on disk, and how it is found again."""

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from keras_iris.self_play.settings import versions


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

    Args:
        path: The folder; made where it isn't there.
        settings: What makes the run's result, as strings and numbers. A
            folder with others is refused.
        execution: How it is carried out: others are simply taken, but fewer
            `iterations`.
        weights: Hash of the model's weights.
        was_left: Whether a run of this folder left the model with them.
        about: More for the manifest.

    Raises:
        ValueError: The folder holds a run with other or unknown settings or
            weights, or can't be written to.
    """

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        path: str | Path,
        *,
        settings: Mapping[str, Any],
        execution: Mapping[str, Any],
        weights: str,
        was_left: Callable[[Path], bool],
        about: Mapping[str, Any],
    ) -> None:
        self.path = Path(path).expanduser().absolute()
        self.manifest = self.path / "manifest.json"
        self.checkpoints = Checkpoints(self.path)
        new = {
            **about,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": {**settings, "weights": weights},
            "execution": execution,
            "versions": versions(),
        }
        # As JSON gives them back.
        text = json.dumps(new, default=lambda number: number.item())
        self.content: dict[str, Any] = json.loads(text)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.manifest.exists():
                self._go_on(was_left(self.path))
            elif self.checkpoints.files():
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

    def _go_on(self, was_left: bool) -> None:
        """Makes the manifest on disk this one's, if it is the same run."""
        old, new = _read_manifest(self.manifest), self.content
        known = self.checkpoints.weights()
        if was_left or new["settings"]["weights"] in known:
            new["settings"]["weights"] = old["settings"].get("weights")
        differences = _differences(old["settings"], new["settings"])
        there, here = (c["execution"]["iterations"] for c in (old, new))
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
        new["created"] = old.get("created")
        new["earlier"] = old.get("earlier", [])
        changed = {
            part: old[part]
            for part in ("execution", "versions")
            if old[part] != new[part]
        }
        if changed:
            new["earlier"].append(changed)
        for line in _differences(old["versions"], new["versions"]):
            warnings.warn(
                f"The run in {self.path} goes on with another version, "
                f"{line}: it may not end in the same weights.",
                stacklevel=5,
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Holds the folder for this process, and writes the manifest.

        Raises:
            ValueError: Another process holds it, or another run has begun in
                it meanwhile.
        """
        with locked(self.path):
            if self.manifest.exists():
                there = _read_manifest(self.manifest)["settings"]
                lines = _differences(there, self.content["settings"])
                if lines:
                    raise ValueError(
                        f"Another run has begun in {self.path} since this one "
                        f"was made: {'; '.join(lines)}. Pass another "
                        "`run_dir`."
                    )
            shards = self.path.glob("iteration_*/*")
            for folder in (self.path, self.path / "starts", *shards):
                remove_unfinished(folder)
            with replaced(self.manifest) as temporary:
                temporary.write_text(json.dumps(self.content, indent=2))
            yield

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

    def shard_size(self, name: str, key: str) -> int | None:
        """Responses of a file of the shards that are there already.

        Args:
            name: As in `shard`.
            key: As in `shard`; shards of another don't count.
        """
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


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for part in ("settings", "execution", "versions"):
            content[part].items()
        content["execution"]["iterations"] + 0
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not the manifest of a run ({error!r}). Put the "
            "right one back, or pass another `run_dir`."
        ) from error


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
