"""Rows of data from wherever they are, and what becomes of bad ones."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from keras_iris.files import parse_json

OnBadRow = Literal["error", "drop"]
T = TypeVar("T")


class BadRows:
    """Raises the error of a bad row, or counts it.

    Args:
        on_bad_row: `"error"` or `"drop"`.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, on_bad_row: OnBadRow = "error"):
        if on_bad_row not in ("error", "drop"):
            raise ValueError(
                "Expected `on_bad_row` to be 'error' or 'drop', received "
                f"{on_bad_row!r}."
            )
        self.on_bad_row = on_bad_row
        self.errors = 0
        self.first: ValueError | None = None

    def add(self, error: ValueError) -> None:
        """Takes a row's error."""
        if self.on_bad_row == "error":
            raise error
        self.errors += 1
        self.first = self.first or error

    def report(self, num_good: int) -> None:
        """Says in one warning how many rows were dropped."""
        if self.errors:
            warnings.warn(
                f"{self.errors} of {num_good + self.errors} rows were dropped. "
                f"The first of them: {self.first}",
                stacklevel=3,
            )


def read_rows(
    source: Any, read: Callable[[Any, str], T], bad_rows: BadRows
) -> Iterator[T]:
    """Reads a source row by row, with little of it in memory.

    Args:
        source: An iterable of rows (a list, or a `datasets.Dataset`), or the
            path of a `.jsonl` or `.parquet` file.
        read: Makes of (row, where it stands) what is wanted; a `ValueError`
            says that the row is bad.
        bad_rows: Takes the errors.

    Raises:
        ValueError: If the source can't be read, or is empty.
    """
    is_empty = True
    for where, row in _locate(source):
        is_empty = False
        try:
            if isinstance(row, ValueError):
                raise row
            result = read(row, where)
        except ValueError as error:
            bad_rows.add(error)
        else:
            yield result
    if is_empty:
        name = source if isinstance(source, str | Path) else "the source"
        raise ValueError(
            f"The data is empty: {name} has no rows. Expected at least one row."
        )


def _locate(source: Any) -> Iterator[tuple[str, Any]]:
    """Yields (where, row, or the error of one that isn't JSON)."""
    if isinstance(source, str | Path):
        yield from _read_file(Path(source).expanduser())
        return
    if isinstance(source, Mapping):
        raise ValueError(
            f"Expected an iterable of rows, received a mapping with the keys "
            f"{sorted(map(str, source))}. Choose one split of a dataset, or "
            "put a single row into a list."
        )
    if not isinstance(source, Iterable):
        raise ValueError(
            "Expected a list of rows, a `datasets.Dataset` or the path of a "
            f".jsonl or .parquet file, received {type(source).__name__}."
        )
    for index, row in enumerate(source):
        yield f"row {index}", row


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Cannot read {path}: the file name ends in {path.suffix!r}, "
            "expected '.jsonl' or '.parquet'. Load a dataset of the hub with "
            "`keras_iris.data.load_dataset`, and turn other files into these."
        )
    if not path.is_file():
        raise ValueError(
            f"There is no file {path} (looked in {path.parent.resolve()}). "
            "Pass the path of a .jsonl or .parquet file."
        )
    yield from reader(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {path}"
            try:
                # Some editors start a file with a byte-order mark.
                if text := line.decode("utf-8-sig").strip():
                    yield where, parse_json(text)
            except ValueError as error:  # of JSON or of UTF-8
                text = line.decode("utf-8", errors="replace").strip()
                yield (
                    where,
                    ValueError(
                        f"{where} is not valid JSON in UTF-8 ({error}): "
                        f"{shorten(text)}. Expected one JSON object a line."
                    ),
                )


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"row {index} of {path}", row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a Parquet file, or is damaged after row {index} "
            f"({error}). Download it or write it again."
        ) from error


def shorten(text: str, size: int = 80) -> str:
    """At most so many characters of a text, for a message."""
    return text if len(text) <= size else text[: size - 3] + "..."
