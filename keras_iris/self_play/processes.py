"""What the processes of a run do together; of one process, nothing."""

import json
from collections.abc import Callable
from typing import Any

from keras_iris import backend


def is_first() -> bool:
    """Whether this is process 0, which writes what all share."""
    return backend.process_index() == 0


def from_first(function: Callable[[], Any]) -> Any:
    """What a function returns in process 0; in every process.

    Args:
        function: Called in process 0 only. Returns what JSON knows.

    Raises:
        Exception: What it raises; in other processes as a `ValueError`.
    """
    if backend.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    failure: BaseException | None = None
    if is_first():
        try:
            answer = {"value": function()}
        except Exception as error:
            failure, answer = error, {"error": f"{error}"}
    answer = json.loads(backend.exchange(json.dumps(answer))[0])
    if failure is not None:
        raise failure
    if "error" in answer:
        raise ValueError(f"Process 0: {answer['error']}")
    return answer["value"]


def first_error(error: str) -> str:
    """What went wrong in some process, an empty string if nothing did.

    Args:
        error: What went wrong in this one.
    """
    errors = [text for text in backend.exchange(error) if text]
    return errors[0] if errors else ""


def check_same(facts: dict[str, Any]) -> None:
    """Refuses a process whose run is another than that of process 0.

    Args:
        facts: What the run is, as JSON knows it.

    Raises:
        ValueError: In every process, with a line a difference.
    """
    texts = backend.exchange(json.dumps(facts))
    first = json.loads(texts[0])
    lines = []
    for number, text in enumerate(texts):
        here = json.loads(text)
        lines += [
            f"  {name}: {first.get(name)!r} in process 0, {here.get(name)!r} "
            f"in process {number}"
            for name in sorted(first.keys() | here.keys())
            if first.get(name) != here.get(name)
        ]
    if lines:
        raise ValueError(
            "The processes of a run have to have the same code, data and "
            "settings:\n" + "\n".join(lines[:20])
        )
