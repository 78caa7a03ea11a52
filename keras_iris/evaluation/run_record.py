"""Reads the files of a run that was finished, killed, or is still going."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.numpy import load_file

from keras_iris.evaluation.score_mode import score_mode
from keras_iris.files import parse_json
from keras_iris.metrics import ExampleScore

Line = dict[str, Any]
_PLACE = ("iteration", "step")
_NUMBER = (int, float)
# What a line of a file of texts has beside its iteration and number.
_TEXTS: dict[str, dict[str, Any]] = {
    "answers": {"prompt": str, "annotated": str, "answer": str},
    "weights": {
        **{"column": str, "weight": _NUMBER},
        **{"prompt": str, "response": str},
    },
}
_COUNTS = {
    "step": _PLACE,
    "evaluation": _PLACE,
    "alarm": _PLACE,
    "iteration": _PLACE[:1],
}


class RunRecord(NamedTuple):
    """What a run's folder says: its metrics, its manifest or an empty one."""

    name: str
    lines: list[Line]
    manifest: dict[str, Any]
    folder: Path | None = None

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
        if self.folder is None:
            return None
        file = f"evaluations/iteration_{iteration:03d}.safetensors"
        try:
            arrays = load_file(self.folder / file)
            parts = [arrays[f"{name}.{p}"] for p in ("values", "weights")]
        except (OSError, KeyError, SafetensorError):
            return None
        return ExampleScore(*parts)

    def answers(self) -> dict[int, dict[int, Line]]:
        """Answers to held-out prompts, by prompt and iteration."""
        return self._texts("answers")

    def weighted_rows(self) -> list[Line]:
        """Responses that counted most and least in the last iteration."""
        found = self._texts("weights")
        last = max((i for rows in found.values() for i in rows), default=0)
        return [rows[last] for rows in found.values() if last in rows]

    def _texts(self, name: str) -> dict[int, dict[int, Line]]:
        """The lines of a file of texts, by number and iteration."""
        file = self.folder and self.folder / f"{name}.jsonl"
        found: dict[int, dict[int, Line]] = {}
        types = {"number": int, "iteration": int, **_TEXTS[name]}
        for text in _read_lines(file) if file and file.is_file() else []:
            try:
                line = parse_json(text)
                is_whole = all(isinstance(line[n], types[n]) for n in types)
            except (ValueError, KeyError, TypeError):
                is_whole = False  # it was being written at a kill
            if is_whole:
                found.setdefault(line["number"], {})[line["iteration"]] = line
        return found

    def mode(self, score: str) -> str | None:
        """Which way a score is better, if that is known."""
        return score_mode(score, self.manifest.get("score_modes"))

    def label(self, score: str) -> str:
        """A score's name, and which way it is better."""
        ways = {"min": " (lower is better)", "max": " (higher is better)"}
        return score + ways.get(self.mode(score) or "", "")


def read_runs(run_dir: Path) -> tuple[RunRecord, list[RunRecord]]:
    """Reads a run, and the sub-folders that are runs themselves, by name."""
    run, others = _read_run(run_dir, "this run"), []
    for file in sorted(run_dir.glob("*/metrics.jsonl")):
        try:
            others.append(_read_run(file.parent, file.parent.name))
        except ValueError as error:  # another tool's, maybe
            warnings.warn(f"Left out of the report: {error}", stacklevel=3)
    return run, others


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
        line = _parse(text) or _parse(text[max(0, text.rfind('{"kind"')) :])
        if line is not None:
            key = (line.get("kind"), line.get("iteration"), line.get("step"))
            lines[key] = line
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


def _parse(text: str) -> Line | None:
    """The object of a line, or None where it isn't a whole one of a run."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        return None
    numbers = {name: line[name] for name in line if name != "kind"}
    counts = _COUNTS.get(line["kind"], ())
    is_whole = all(isinstance(numbers.get(name), int) for name in counts)
    is_whole &= all(map(_is_number, numbers.values()))
    return line if is_whole else None


def _is_number(value: Any) -> bool:
    """Whether it is one that a float can be."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float)
