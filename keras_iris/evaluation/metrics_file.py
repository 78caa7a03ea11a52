"""Reads `metrics.jsonl`, also of a run that was killed and resumed."""

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]
# Beside those of numbers only, which is what a line's other values are.
_COUNTS = {
    "step": ("iteration", "step"),
    "evaluation": ("iteration", "step"),
    "iteration": ("iteration",),
}


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
    path = Path(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"Expected a run's folder, with a file metrics.jsonl. Received: "
            f"{path}. Pass the `run_dir` of a run that has started."
        )
    # Half a line may hold half a character.
    texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    lines: dict[tuple[Any, ...], Line] = {}
    for number, text in enumerate(texts, 1):
        line = _parse(text)
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


def _parse(text: str) -> Line | None:
    """The object of a line, or None where none is whole.

    A resumed run writes on where the killed one stopped in mid-line, so a
    whole object may follow the start of another.
    """
    for start in (0, text.rfind('{"kind"')):
        try:
            line = json.loads(text[max(start, 0) :])
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and _is_of_a_run(line):
            return line
    return None


def _is_of_a_run(line: Line) -> bool:
    counts = _COUNTS.get(line.get("kind", ""), ())
    return all(isinstance(line.get(name), int) for name in counts) and all(
        isinstance(value, int | float)
        for name, value in line.items()
        if name != "kind"
    )
