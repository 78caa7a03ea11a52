"""Tokenised examples kept on disk."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from keras_iris.data.conversations import Conversation
from keras_iris.data.example import Example
from keras_iris.files import replaced

_FORMAT = 4  # advance when `tokenize` gives other ids
_BATCH = 1024  # examples


def cache_file(folder: str | Path, facts: Sequence[Any], source: Any) -> Path:
    """The file that keeps the examples of a source.

    Args:
        folder: Where.
        facts: All that the examples depend on beside the data.
        source: A path, whose content counts, or an iterable of rows.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *facts]).encode())
    if isinstance(source, str | Path):
        file = Path(source).expanduser()
        if file.is_file():  # if not, reading says so
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        for row in source:
            if isinstance(row, Conversation):
                row = [row.prompt, row.response]
            line = json.dumps(row, sort_keys=True, default=repr)
            digest.update(line.encode() + b"\n")
    name = f"tokens-{digest.hexdigest()[:32]}.arrow"
    return Path(folder).expanduser() / name


def cached(
    path: Path, make_examples: Callable[[], Iterator[Example]]
) -> list[Example]:
    """The examples of an Arrow file, which is made if it isn't there.

    A damaged file is made again, with a warning. The arguments are the file
    and what makes the examples.
    """
    if path.is_file():
        try:
            return list(_read(path))
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(
                f"The cache file {path} is damaged ({error}) and is made "
                "again.",
                stacklevel=3,
            )
    return _write(path, make_examples())


def _write(path: Path, examples: Iterator[Example]) -> list[Example]:
    import pyarrow  # type: ignore[import-untyped]

    ids = pyarrow.large_list(pyarrow.int32())
    schema = pyarrow.schema({"prompt_ids": ids, "response_ids": ids})
    written: list[Example] = []
    with replaced(path) as temporary, pyarrow.OSFile(str(temporary), "wb") as f:
        with pyarrow.ipc.new_file(f, schema) as writer:
            while batch := list(islice(examples, _BATCH)):
                columns = {
                    name: [getattr(example, name) for example in batch]
                    for name in schema.names
                }
                writer.write_batch(
                    pyarrow.RecordBatch.from_pydict(columns, schema)
                )
                written += batch
    return written


def _read(path: Path) -> Iterator[Example]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        reader = pyarrow.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            columns = reader.get_batch(number).columns
            rows = (c.to_numpy(zero_copy_only=False) for c in columns)
            yield from map(Example, *rows)
