"""What a run tells of itself: files that grow by lines, and how to read them.

A run may be killed at any time, also while it writes, and is resumed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from keras_iris.files import parse_json, telling_of
from keras_iris.metrics import ExampleScore
from keras_iris.self_play.arrays import write_arrays
from keras_iris.self_play.processes import is_first

Line = dict[str, Any]
_PLACE = {"iteration": int, "step": int}
# What lines of `metrics.jsonl` have by their kind, beside other numbers.
_COUNTS = dict.fromkeys(("step", "evaluation", "alarm"), _PLACE)
_COUNTS["iteration"] = {"iteration": int}
# What those of files of texts have.
_TEXT = {"iteration": int, "number": int, "prompt": str}
_TEXTS: dict[str, dict[str, Any]] = {
    "answers": {**_TEXT, "annotated": str, "answer": str},
    "weights": {**_TEXT, "column": str, "weight": int | float, "response": str},
}


class RunLog:
    """Writes lines, and the scores of single examples.

    Args:
        folder: The run's, with a `metrics.jsonl`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kind: str, **values: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        self._append("metrics", [{"kind": kind, **values}])

    def write_scores(self, scores: Any, **where: float) -> dict[str, float]:
        """Appends a line of what `evaluate` returned; gives it as numbers.

        Scores that remember their examples are kept with them, and so are
        answers of `keras_iris.evaluation.HeldOut`.
        """
        try:
            self._keep_examples(scores, int(where["iteration"]))
            numbers = {name: float(value) for name, value in scores.items()}
            self.write("evaluation", **where, **numbers)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "`evaluate` has to return a dictionary of numbers, of other "
                f"names than {sorted(['kind', *where])}. Received: {scores!r}"
            ) from error
        return numbers

    def write_texts(
        self, name: str, iteration: int, lines: Sequence[Line]
    ) -> None:
        """Appends lines with texts, of an iteration, to a file of their own.

        Args:
            name: `"answers"` or `"weights"`.
            iteration: Number of the iteration.
            lines: Texts and numbers by name.
        """
        place = {"iteration": iteration}
        self._append(
            name, [{**place, "number": i, **x} for i, x in enumerate(lines)]
        )

    def _append(self, name: str, lines: Sequence[Line]) -> None:
        if not (lines and is_first()):
            return
        path = self.folder / f"{name}.jsonl"
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        with telling_of(path):
            # There as long as the folder is, which mustn't come to be again.
            (self.folder / "metrics.jsonl").stat()
            with open(path, "a") as file:
                file.write(text)

    def _keep_examples(self, scores: Any, iteration: int) -> None:
        self.write_texts("answers", iteration, getattr(scores, "answers", []))
        arrays = {
            f"{name}.{part}": getattr(score, part)
            for name, score in scores.items()
            if isinstance(score, ExampleScore)
            for part in ("values", "weights")
        }
        if arrays and is_first():
            write_arrays(_examples_file(self.folder, iteration), arrays, {})


def _examples_file(folder: Path, iteration: int) -> Path:
    return folder / f"evaluations/iteration_{iteration:03d}.safetensors"


def read_examples(
    folder: Path, name: str, iteration: int
) -> ExampleScore | None:
    """A score with its examples, if they were kept."""
    try:
        arrays = load_file(_examples_file(folder, iteration))
        parts = [arrays[f"{name}.{p}"] for p in ("values", "weights")]
    except (OSError, KeyError, SafetensorError):
        return None
    return ExampleScore(*parts)


def read_texts(folder: Path, name: str) -> dict[tuple[int, int], Line]:
    """The whole lines of a file of texts, by their number and iteration.

    A line that a kill has cut off is left out.

    Args:
        folder: The run's.
        name: As in `RunLog.write_texts`.
    """
    file = folder / f"{name}.jsonl"
    texts = _read_lines(file) if file.is_file() else []
    lines = filter(None, (_parse(text, _TEXTS[name]) for text in texts))
    return {(line["number"], line["iteration"]): line for line in lines}


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
