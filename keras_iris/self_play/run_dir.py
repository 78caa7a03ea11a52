"""What a run keeps on disk, and how it is found again."""

import json
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from keras_iris import backend
from keras_iris.data.rows import shorten
from keras_iris.files import (
    locked,
    parse_json,
    remove_unfinished,
    replaced,
)
from keras_iris.self_play.arrays import (
    Arrays,
    read_arrays,
    read_metadata,
    write_arrays,
)
from keras_iris.self_play.checkpoints import Checkpoints
from keras_iris.self_play.processes import (
    check_same,
    from_first,
    is_first,
)
from keras_iris.self_play.run_log import RunLog

Manifest = dict[str, Any]

# Those of Keras that change what is trained, and don't tell their arguments.
_CALLBACKS = ("EarlyStopping", "LearningRateScheduler", "ReduceLROnPlateau")


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
        evaluations/              scores of single held-out examples
        answers.jsonl             the model's answers to some held-out prompts
        weights.jsonl             responses that counted most and least

    It is made where it isn't there; one that can't be written to is refused.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.manifest = self.path / "manifest.json"
        self.checkpoints = Checkpoints(self.path)
        self.log = RunLog(self.path)
        self.texts: dict[str, str] = {}
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
        old = read_manifest(self.manifest)
        # Training changes weights and learning rate: those of a checkpoint,
        # and as a run has left its model, are this run's as well.
        left, settings = old.get("left", {}), new["settings"]
        for name, value in settings.items():
            is_known = name == "weights" and value in self.checkpoints.weights()
            if is_known or (name in left and left[name] == value):
                settings[name] = old["settings"].get(name)
        # A run may be evaluated from now on, or no more.
        for name in old["settings"].keys() ^ settings.keys():
            if name.partition(".")[0] == "evaluate":
                value = old["settings"].get(name, settings.get(name))
                old["settings"][name] = settings[name] = value
        fewer = []
        there, here = (m["execution"]["iterations"] for m in (old, new))
        if here < there:
            fewer = [
                f"iterations: {there} there, {here} here; more can be added"
            ]
        check_settings(self.path, old["settings"], settings, fewer)
        parts = ("execution", "versions")
        changed = {part: old[part] for part in parts if old[part] != new[part]}
        earlier = [*old.get("earlier", []), *([changed] if changed else [])]
        return {**new, "created": old.get("created"), "earlier": earlier}

    @contextmanager
    def open(self, describe: Callable[[], Manifest]) -> Iterator[None]:
        """Holds the folder for this run, and tells of the run in it.

        Args:
            describe: What the run is at that moment, as in `join`. Every
                process calls it.

        Raises:
            ValueError: Another run holds it, a process has other settings
                than process 0, or as in `join`.
        """
        with ExitStack() as stack:
            from_first(lambda: stack.enter_context(locked(self.path)))
            new = json.loads(json.dumps(describe()))
            check_same(new["settings"] | new["versions"])
            manifest = from_first(lambda: self._begin(new))
            try:
                yield
            except BaseException:
                # Other processes may be elsewhere: nothing is done together.
                if backend.process_count() == 1 and self.manifest.exists():
                    with suppress(OSError):  # which is raised already
                        self._end(manifest, describe)
                raise
            self._end(manifest, describe)

    def _begin(self, new: Manifest) -> Manifest:
        """Writes the manifest of a run that goes on, or begins."""
        manifest = self.join(new)
        if self.manifest.exists():
            self._warn(read_manifest(self.manifest), manifest)
        for name, text in self.texts.items():
            with replaced(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        shards = self.path.glob("iteration_*/*")
        for folder in (self.path, self.path / "starts", *shards):
            remove_unfinished(folder)
        self._write(manifest)
        return manifest

    def _end(
        self, manifest: Manifest, describe: Callable[[], Manifest]
    ) -> None:
        left = _left(manifest, describe)
        if is_first():
            self._write(manifest | {"left": left})

    def _warn(self, there: Manifest, here: Manifest) -> None:
        """Tells of what may change a result, and what it was before."""
        old, new = (
            {
                **manifest["versions"],
                "callbacks": [
                    name
                    for name in manifest["execution"]["callbacks"]
                    if name in _CALLBACKS
                ],
            }
            for manifest in (there, here)
        )
        for line in _differences(old, new):
            warnings.warn(
                f"The run in {self.path} goes on with another version or "
                f"callback, {line}: it may not end in the same weights.",
                stacklevel=5,
            )

    def _write(self, manifest: Manifest) -> None:
        with replaced(self.manifest) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2))

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

    def shards(
        self,
        name: str,
        keys: Sequence[str],
        *,
        size: int,
        make: Callable[[list[int]], Generator[Arrays, None, None]] | None,
        by_first: bool = False,
    ) -> list[Arrays]:
        """Reads the shards of a folder; makes and writes those that it lacks.

        A shard that can't be read, or was made from something else, is made
        again, with a warning. Every process writes its share of them.

        Args:
            name: Folder of the shards, such as `"iteration_001/synthetic"`.
            keys: Of each shard, what names all that it depends on.
            size: Responses of a shard.
            make: Makes the arrays of shards, by their numbers, one after
                another; None where nothing can any more.
            by_first: Whether process 0 makes and writes all of them. `make` is
                called without numbers in the others.

        Raises:
            LostShard: A shard isn't there, and can't be made again.
        """
        found = [self._read(name, i, key) for i, key in enumerate(keys)]
        reasons = [part if isinstance(part, str) else "" for part in found]
        # Where one process lacks a shard, all make it.
        for texts in backend.exchange(json.dumps(reasons)):
            theirs = json.loads(texts)
            reasons = [a or b for a, b in zip(reasons, theirs, strict=True)]
        missing = [number for number, reason in enumerate(reasons) if reason]
        if missing and make is None:
            raise LostShard(
                f"{reasons[missing[0]]}, and the weights that made it have "
                "been trained since. Put the file back, or start again with "
                "another `run_dir`."
            )
        for number in missing:
            if self._shard_path(name, number).exists():
                warnings.warn(
                    f"{reasons[number]}. It is made again.", stacklevel=2
                )
        count, index = backend.process_count(), backend.process_index()
        own = missing[index::count]
        if by_first:
            own = missing if is_first() else []
        made = missing if backend.IS_ONE_PROGRAM and not by_first else own
        is_asked = bool(missing if by_first else made)
        with closing(make(made) if make and is_asked else _nothing()) as parts:
            for number, part in zip(made, parts, strict=True):
                found[number] = part
                if number in own:
                    metadata = {"key": keys[number], "shard_size": str(size)}
                    write_arrays(self._shard_path(name, number), part, metadata)
        backend.exchange("")  # all are written
        return [
            part if isinstance(part, dict) else self._others(name, i, keys[i])
            for i, part in enumerate(found)
        ]

    def _others(self, name: str, number: int, key: str) -> Arrays:
        """A shard that another process has made."""
        part = self._read(name, number, key)
        if isinstance(part, str):
            raise ValueError(
                f"{part}: another process has written it. The run folder has "
                "to be one that all processes see."
            )
        return part

    def _read(self, name: str, number: int, key: str) -> Arrays | str:
        """A shard, or why it can't be taken."""
        path = self._shard_path(name, number)
        if not path.exists():
            return f"{path} isn't there"
        try:
            arrays, metadata = read_arrays(path)
        except ValueError as error:
            return str(error)
        if metadata.get("key") != key:
            return f"{path} was made from other weights, settings or data"
        return arrays

    def _shard_path(self, name: str, number: int) -> Path:
        return self.path / name / f"{number:05d}.safetensors"


def _nothing() -> Generator[Arrays, None, None]:
    yield from ()


def read_manifest(file: Path) -> Manifest:
    """What a run was, checked for the parts that this package reads."""
    try:
        content: Manifest = parse_json(file.read_text(encoding="utf-8"))
        for part in ("settings", "execution", "versions"):
            content[part].items()
        content.get("left", {}).items()
        [*content.get("earlier", []), *content["execution"]["callbacks"]]
        content["execution"]["iterations"] + 0
        return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


def check_settings(
    path: Path,
    old: dict[str, Any],
    new: dict[str, Any],
    others: Sequence[str] = (),
) -> None:
    """Refuses to go on with another run.

    Args:
        path: Its folder.
        old: Settings there.
        new: Settings here, as JSON gives them back.
        others: More lines that say what differs.

    Raises:
        ValueError: With a line a difference.
    """
    differences = [*_differences(old, new), *others]
    if differences:
        lines = "\n".join(f"  {shorten(line, 300)}" for line in differences)
        raise ValueError(
            f"{path} holds a run with other settings:\n{lines}\n"
            "Continue it with its own settings and the model it started "
            "from, or pass another `run_dir`."
        )


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name)!r} there, {new.get(name)!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
