"""Reads the files of a run that was finished, killed, or is still going."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load_file

from keras_iris.evaluation.score_mode import score_mode
from keras_iris.files import parse_json
from keras_iris.metrics import ExampleScore

Line = dict[str, Any]
_PLACE = {"iteration": int, "step": int}
# What lines of `metrics.jsonl` have by their kind, beside other numbers.
_COUNTS = dict.fromkeys(("step", "evaluation", "alarm"), _PLACE)
_COUNTS["iteration"] = {"iteration": int}
# What those of `answers.jsonl` and `weights.jsonl` have.
_TEXT = {"iteration": int, "number": int, "prompt": str}
_ANSWER = {**_TEXT, "annotated": str, "answer": str}
_WEIGHT = {**_TEXT, "column": str, "weight": int | float, "response": str}


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
        return [n for n in names if n not in ("kind", "seconds", *_PLACE)]

    def scores(self, name: str) -> dict[int, float]:
        """A value of the evaluations by iteration, 0 before self-play."""
        evaluations = self.of_kind("evaluation")
        return {e["iteration"]: e[name] for e in evaluations if name in e}

    def examples(self, name: str, iteration: int) -> ExampleScore | None:
        """A score with its examples, if they were kept."""
        file = f"evaluations/iteration_{iteration:03d}.safetensors"
        try:
            arrays = load_file(self.folder / file)
            parts = [arrays[f"{name}.{p}"] for p in ("values", "weights")]
        except (OSError, KeyError, SafetensorError):
            return None
        return ExampleScore(*parts)

    def answers(self) -> dict[tuple[int, int], Line]:
        """Answers to held-out prompts, by the prompt's number and iteration."""
        return self._texts("answers", _ANSWER)

    def weighted_rows(self) -> list[Line]:
        """Responses that counted most and least in the last iteration."""
        found = self._texts("weights", _WEIGHT)
        last = max((iteration for _, iteration in found), default=0)
        return [line for (_, i), line in found.items() if i == last]

    def _texts(
        self, name: str, types: dict[str, Any]
    ) -> dict[tuple[int, int], Line]:
        """The whole lines of a file of texts; a kill may have cut one off."""
        file = self.folder / f"{name}.jsonl"
        texts = _read_lines(file) if file.is_file() else []
        lines = filter(None, (_parse(text, types) for text in texts))
        return {(line["number"], line["iteration"]): line for line in lines}

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


def read_metrics(path: str | Path) -> list[Line]:
    """Reads the metrics of a run.

    A run that was killed and resumed repeats lines: the last of the same
    kind, iteration and step counts, at the place of the first. The line that
    was being written at the kill is skipped.

    Args:
        path: Folder of the run, or its `metrics.jsonl`.

    Returns:
        The lines, in the order of the run.

    Raises:
        ValueError: There is no such file, or a line isn't what a run writes.
    """
    path = Path(path).expanduser()
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"Expected a run's folder, with a file metrics.jsonl. Received: "
            f"{path}. Pass the `run_dir` of a run that has started."
        )
    texts = _read_lines(file)
    lines: dict[tuple[Any, ...], Line] = {}
    for number, text in enumerate(texts, 1):
        # A resumed run writes on where the killed one stopped in mid-line.
        cut = max(0, text.rfind('{"kind"'))
        if line := _parse(text) or _parse(text[cut:]):
            lines[line["kind"], line.get("iteration"), line.get("step")] = line
        elif text.strip() and number < len(texts):
            raise ValueError(
                "Expected a JSON object of numbers, with its iteration and "
                f"step, in line {number} of {file}. "
                f"Received: {text[:60]!r}. Delete that line."
            )
    return list(lines.values())


def _read_lines(file: Path) -> list[str]:
    # Half a line may hold half a character.
    return file.read_text(encoding="utf-8", errors="replace").split("\n")


def _parse(text: str, types: dict[str, Any] | None = None) -> Line | None:
    """The object of a line, or None where it isn't a whole one of a run.

    Args:
        text: The line.
        types: What it has at least; by default a kind, and numbers only.
    """
    try:
        line = parse_json(text)
        if types is None:
            types = dict.fromkeys(line, int | float) | {"kind": str}
            types |= _COUNTS.get(line["kind"], {})
        is_whole = all(isinstance(line[name], types[name]) for name in types)
        integers = [value for value in line.values() if isinstance(value, int)]
    except (ValueError, KeyError, TypeError):
        return None
    # A float can be each of them.
    return line if is_whole and all(abs(i) < 2**63 for i in integers) else None
