"""A run as it was recorded, in memory."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keras_iris.evaluation.metrics_file import Line, read_metrics

_NOT_SCORES = ("kind", "iteration", "step", "seconds")


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says.

    Attributes:
        name: What to call the run in tables and plots.
        lines: The lines of `metrics.jsonl`.
        manifest: The contents of `manifest.json`, or empty.
    """

    name: str
    lines: list[Line]
    manifest: dict[str, Any]

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of a kind: `step`, `evaluation` or `iteration`."""
        return [line for line in self.lines if line.get("kind") == kind]

    def score_names(self) -> list[str]:
        """Names of the held-out scores, in the order they came."""
        names = {
            name: None
            for line in self.of_kind("evaluation")
            for name, value in line.items()
            if name not in _NOT_SCORES and isinstance(value, int | float)
        }
        return list(names)

    def scores(self, name: str) -> dict[int, float]:
        """Values of a held-out score by iteration; 0 is before self-play."""
        return {
            line["iteration"]: float(line[name])
            for line in self.of_kind("evaluation")
            if name in line
        }

    def evaluation_steps(self) -> dict[int, int]:
        """The step of each iteration's evaluation."""
        return {
            line["iteration"]: line["step"]
            for line in self.of_kind("evaluation")
        }


def read_run(run_dir: Path, name: str) -> RunRecord:
    """Reads a run's folder.

    Raises:
        ValueError: It isn't one, or a file in it can't be read.
    """
    lines = read_metrics(run_dir)
    file = run_dir / "manifest.json"
    manifest: dict[str, Any] = {}
    if file.is_file():
        try:
            manifest = dict(json.loads(file.read_text(encoding="utf-8")))
            for part in ("settings", "versions"):
                manifest[part] = dict(manifest.get(part) or {})
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Expected a JSON object in {file}. Received what can't be "
                f"read: {error}. Delete the file for a report without settings."
            ) from error
    return RunRecord(name, lines, manifest)


def read_comparisons(run_dir: Path) -> list[RunRecord]:
    """Reads the sub-folders that are runs themselves, by name."""
    runs = []
    for file in sorted(run_dir.glob("*/metrics.jsonl")):
        try:
            runs.append(read_run(file.parent, file.parent.name))
        except ValueError as error:  # another tool's, maybe
            warnings.warn(f"Left out of the report: {error}", stacklevel=2)
    return runs
