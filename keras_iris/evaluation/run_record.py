"""Reads the files of a run that was finished, killed, or is still going."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keras_iris.files import parse_json
from keras_iris.metrics import ExampleScore, score_mode
from keras_iris.self_play.run_log import (
    Line,
    read_examples,
    read_metrics,
    read_texts,
)

# What lines of scores have beside them.
_OTHERS = ("kind", "seconds", "iteration", "step")


class RunRecord(NamedTuple):
    """What a run's folder says: its metrics, its manifest or an empty one."""

    name: str
    lines: list[Line]
    manifest: dict[str, Any]
    folder: Path
    others: Sequence["RunRecord"] = ()  # that the run is compared with

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of a kind: `step`, `evaluation`, `iteration`, `alarm`."""
        return [line for line in self.lines if line.get("kind") == kind]

    def score_names(self) -> list[str]:
        """Names of the held-out scores, in the order they came."""
        names = dict.fromkeys(n for e in self.of_kind("evaluation") for n in e)
        return [n for n in names if n not in _OTHERS]

    def scores(self, name: str) -> dict[int, float]:
        """A value of the evaluations by iteration, 0 before self-play."""
        evaluations = self.of_kind("evaluation")
        return {e["iteration"]: e[name] for e in evaluations if name in e}

    def examples(self, name: str, iteration: int) -> ExampleScore | None:
        """A score with its examples, if they were kept."""
        return read_examples(self.folder, name, iteration)

    def answers(self) -> dict[tuple[int, int], Line]:
        """Answers to held-out prompts, by the prompt's number and iteration."""
        return read_texts(self.folder, "answers")

    def weighted_rows(self) -> list[Line]:
        """Responses that counted most and least in the last iteration."""
        found = read_texts(self.folder, "weights")
        last = max((iteration for _, iteration in found), default=0)
        return [line for (_, i), line in found.items() if i == last]

    def mode(self, score: str) -> str | None:
        """Which way a score is better, if that is known."""
        return score_mode(score, self.manifest.get("score_modes"))

    def label(self, score: str) -> str:
        """A score's name, and which way it is better."""
        ways = {"min": " (lower is better)", "max": " (higher is better)"}
        return score + ways.get(self.mode(score) or "", "")


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads a run, and beside it the sub-folders that are runs themselves."""
    folder = Path(run_dir).expanduser()
    run, others = _read_run(folder, "this run"), []
    for file in sorted(folder.glob("*/metrics.jsonl")):
        try:
            others.append(_read_run(file.parent, file.parent.name))
        except ValueError as error:  # another tool's, maybe
            warnings.warn(f"Left out of the report: {error}", stacklevel=3)
    return run._replace(others=others)


def _read_run(run_dir: Path, name: str) -> RunRecord:
    lines = read_metrics(run_dir)
    file = run_dir / "manifest.json"
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else "{}"
        manifest = dict(parse_json(text))
        for part in ("settings", "execution", "versions"):
            manifest[part] = dict(manifest.get(part) or {})
        score_mode("", manifest.get("score_modes"))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected a JSON object in {file}. Received what can't be "
            f"read: {error}. Delete the file for a report without settings."
        ) from error
    return RunRecord(name, lines, manifest, run_dir)
