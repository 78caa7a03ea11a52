"""Rows of any known format to prompts and annotated responses.

Knows nothing of tokens, templates or models.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = tuple[Message, ...] | str

KNOWN_FORMATS = (
    '{"prompt", "response"}, {"prompt", "completion"}, {"messages"} or '
    '{"real", "generated"}'
)


@dataclass(frozen=True)
class Conversation:
    """One prompt and its annotated response.

    Args:
        prompt: A string, or the messages that come before the response, each
            a dict with the strings `"role"` and `"content"`.
        response: The text of the annotated (human) response.
    """

    prompt: Prompt
    response: str

    def first_turn(self) -> "Conversation":
        """The conversation up to the first answer, the others left out."""
        if isinstance(self.prompt, str):
            return self
        for i, message in enumerate(self.prompt):
            if message["role"] == "assistant":
                return Conversation(self.prompt[:i], message["content"])
        return self


def read_conversations(source: Any) -> list[Conversation]:
    """Reads conversations from rows of any known format.

    A row is one of

    - `{"prompt", "response"}` or `{"prompt", "completion"}`, each a string or
      a list of messages;
    - `{"messages"}`: the last assistant turn is the response, what comes
      before it the prompt, what comes after it is left out;
    - `{"real", "generated"}` (SPIN): `real` is read as `messages`, `generated`
      is ignored, because self-play samples its own responses;
    - a `Conversation`.

    Keys beyond these are ignored, and so is a key whose value is `None`.

    Args:
        source: An iterable of rows (a list, or a `datasets.Dataset`), or the
            path of a `.jsonl` or `.parquet` file.

    Returns:
        The conversations, in the order of the rows.

    Raises:
        ValueError: If there are no rows, or a row has no response, an unknown
            format, or isn't valid JSON. The message names the row.

    Example:
    >>> read_conversations([{"prompt": "2 + 2 =", "response": "4"}])
    [Conversation(prompt='2 + 2 =', response='4')]
    """
    conversations = [
        _read_row(row, where) for where, row in labelled_rows(source)
    ]
    if not conversations:
        raise ValueError(
            f"The data is empty: {_describe(source)} has no rows. Expected at "
            f"least one row of the form {KNOWN_FORMATS}."
        )
    return conversations


def labelled_rows(source: Any) -> Iterator[tuple[str, Any]]:
    """Yields (where, row) for each row of a source.

    Args:
        source: An iterable of rows, or the path of a `.jsonl` or `.parquet`
            file.

    Raises:
        ValueError: If the source is anything else, or a line isn't JSON.
    """
    if isinstance(source, str | Path):
        yield from _read_file(Path(source).expanduser())
        return
    if isinstance(source, Mapping):
        raise ValueError(
            f"Expected an iterable of rows, received a mapping with the keys "
            f"{_names(source)}. Choose one split of a dataset, or "
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
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".parquet") and not path.is_file():
        raise ValueError(
            f"There is no file {path} (looked in {path.parent.resolve()}). "
            "Pass the path of a .jsonl or .parquet file."
        )
    if suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise ValueError(
            f"Cannot read {path}: the file name ends in {path.suffix!r}, "
            "expected '.jsonl' or '.parquet'. Load a dataset of the hub with "
            "`keras_iris.data.load_dataset`, and turn other files into these."
        )


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                # Some editors start a file with a byte-order mark.
                yield where, json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # of JSON or of UTF-8
                text = line.decode("utf-8", errors="replace").strip()
                raise ValueError(
                    f"{where} is not valid JSON in UTF-8 ({error}): "
                    f"{_shorten(text)}. Expected one JSON object a line."
                ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"row {index} of {path}", row
                    index += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a Parquet file, or is damaged after row {index} "
            f"({error}). Download it or write it again."
        ) from error


def _read_row(row: Any, where: str) -> Conversation:
    if isinstance(row, Conversation):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, expected a dict of the form "
            f"{KNOWN_FORMATS}."
        )
    fields = {key: value for key, value in row.items() if value is not None}
    answer = fields.get("response", fields.get("completion"))
    if "prompt" in fields and answer is not None:
        return _read_pair(fields["prompt"], answer, where)
    if "messages" in fields:
        return _split_messages(fields["messages"], where)
    if "real" in fields:
        return _split_messages(fields["real"], where)
    if "prompt" in fields:
        raise _no_response(where, f"its keys are {_names(fields)}")
    raise ValueError(
        f"{where} has an unknown format: its keys are {_names(fields)}, "
        f"expected {KNOWN_FORMATS}. Rename the columns."
    )


def _read_pair(prompt: Any, response: Any, where: str) -> Conversation:
    if isinstance(response, str):
        if not isinstance(prompt, str):
            prompt = _read_messages(prompt, where)
        return _conversation(prompt, response, where)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return _split_messages(
        [*_read_messages(prompt, where), *_read_messages(response, where)],
        where,
        first=len(prompt),
    )


def _split_messages(messages: Any, where: str, first: int = 0) -> Conversation:
    """The last assistant turn, from message `first` on, and what is before."""
    messages = _read_messages(messages, where)
    roles = [message["role"] for message in messages]
    turns = [i for i in range(first, len(roles)) if roles[i] == "assistant"]
    if not turns:
        raise _no_response(
            where, f"no assistant turn among the roles {roles[first:]}"
        )
    last = turns[-1]
    return _conversation(messages[:last], messages[last]["content"], where)


def _read_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if isinstance(messages, str | Mapping) or not isinstance(
        messages, Iterable
    ):
        raise ValueError(
            f"{where}: expected a list of messages, received "
            f"{_shorten(repr(messages))}."
        )
    return tuple(_read_message(message, where) for message in messages)


def _read_message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            return {"role": role, "content": content}
    raise ValueError(
        f"{where}: expected messages with the strings 'role' and 'content', "
        f"received {_shorten(repr(message))}. Remove the row, or write what "
        "the message holds instead (calls of tools, images) into 'content' as "
        "text."
    )


def _conversation(prompt: Prompt, response: str, where: str) -> Conversation:
    if not prompt:
        raise ValueError(
            f"{where} has an empty prompt. Expected text or at least one "
            "message before the response."
        )
    if not response.strip():
        raise _no_response(where, "it is an empty text")
    return Conversation(prompt, response)


def _no_response(where: str, reason: str) -> ValueError:
    return ValueError(
        f"{where} has no response ({reason}). Expected a 'response' or "
        "'completion' text, or a last assistant turn. Remove the row or add "
        "its response."
    )


def _names(fields: Mapping[Any, Any]) -> list[str]:
    return sorted(map(str, fields))


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the source"


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
