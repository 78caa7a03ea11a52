"""Rows of any known format to prompts and annotated responses.

Knows nothing of tokens, templates or models.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from keras_iris.data.rows import BadRows, OnBadRow, read_rows, shorten

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = tuple[Message, ...] | str

KNOWN_FORMATS = (
    '{"prompt", "response"}, {"prompt", "completion"}, {"messages"} or '
    '{"real", "generated"}'
)
# Parts of a conversation under names that aren't read: leaving them out would
# train on another conversation than the data holds.
_OTHER_COLUMNS = {
    *("system", "system_prompt", "instruction", "input", "context", "history"),
    *("tools", "functions", "documents", "images", "audio"),
}
# Of a message, beside role and content, for templates that write them.
_KEPT_KEYS = ("name", "tool_call_id")
_OTHER_KEYS = {
    *("tool_calls", "function_call", "reasoning_content", "reasoning"),
    *("thinking", "images", "audio"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One prompt and its annotated response.

    Args:
        prompt: A string, or the messages that come before the response, each
            a dict with the strings `"role"` and `"content"`, and perhaps
            `"name"` and `"tool_call_id"`.
        response: The text of the annotated (human) response.
        where: Where it was read, such as "line 7 of data.jsonl".
    """

    prompt: Prompt
    response: str
    where: str = field(default="", compare=False, repr=False)

    def first_turn(self) -> "Conversation":
        """The conversation up to the first answer, the others left out."""
        if isinstance(self.prompt, str):
            return self
        for i, message in enumerate(self.prompt):
            if message["role"] == "assistant":
                return Conversation(self.prompt[:i], message["content"])
        return self


def read_conversations(
    source: Any, *, on_bad_row: OnBadRow = "error"
) -> list[Conversation]:
    """Reads conversations from rows of any known format.

    A row is one of

    - `{"prompt", "response"}` or `{"prompt", "completion"}`, each a string or
      a list of messages;
    - `{"messages"}`: the last assistant turn is the response, what comes
      before it the prompt, what comes after it is left out;
    - `{"real", "generated"}` (SPIN): `real` is read as `messages`, `generated`
      is ignored, because self-play samples its own responses;
    - a `Conversation`.

    Other keys are ignored, and so is a key without a value; but a row that
    keeps parts of the conversation elsewhere (`system`, `input`, `tools`, a
    message's `tool_calls`) is a bad one.

    Args:
        source: An iterable of rows (a list, or a `datasets.Dataset`), or the
            path of a `.jsonl` or `.parquet` file.
        on_bad_row: What happens to a row without response, of an unknown
            format, with text that isn't Unicode, or that isn't JSON:
            `"error"` raises, `"drop"` leaves it out and counts it.

    Returns:
        The conversations, in the order of the rows.

    Raises:
        ValueError: If there are no rows, or a row is bad. The message names
            the row, of a file with its line.

    Examples:
        >>> read_conversations([{"prompt": "2 + 2 =", "response": "4"}])
        [Conversation(prompt='2 + 2 =', response='4')]
    """
    bad_rows = BadRows(on_bad_row)
    conversations = list(read_rows(source, read_conversation, bad_rows))
    bad_rows.report(len(conversations))
    if not conversations:
        raise ValueError(f"No row is left. The first: {bad_rows.first}")
    return conversations


def read_conversation(row: Any, where: str) -> Conversation:
    """The conversation of one row.

    Args:
        row: As in `read_conversations`.
        where: What errors call it.

    Raises:
        ValueError: If it is a bad one.
    """
    if isinstance(row, Conversation):
        return Conversation(
            _check_prompt(row.prompt, row.where or where),
            _check_text(row.response, row.where or where),
            row.where or where,
        )
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where} is a {type(row).__name__}, expected a dict of the form "
            f"{KNOWN_FORMATS}."
        )
    fields = {key: value for key, value in row.items() if value is not None}
    names = sorted(map(str, fields))
    answer = fields.get("response", fields.get("completion"))
    messages = fields.get("messages", fields.get("real"))
    if "prompt" in fields and answer is not None:
        conversation = _read_pair(fields["prompt"], answer, where)
    elif messages is not None:
        conversation = _split_messages(messages, where)
    elif "prompt" in fields:
        raise _no_response(where, f"its keys are {shorten(str(names))}")
    else:
        raise ValueError(
            f"{where} has an unknown format: its keys are "
            f"{shorten(str(names))}, expected {KNOWN_FORMATS}. Write all that "
            "belongs to the prompt into 'prompt' or 'messages'."
        )
    _refuse_parts(fields, _OTHER_COLUMNS, where)
    return conversation


def _check_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if isinstance(messages, str | Mapping) or not isinstance(
        messages, Iterable
    ):
        raise ValueError(
            f"{where}: expected a list of messages, received "
            f"{shorten(repr(messages))}."
        )
    return tuple(_check_message(message, where) for message in messages)


def _check_message(message: Any, where: str) -> Message:
    if isinstance(message, Mapping):
        _refuse_parts(message, _OTHER_KEYS, f"a message of {where}")
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            kept = {key: message.get(key) for key in _KEPT_KEYS}
            texts = {k: v for k, v in kept.items() if v and isinstance(v, str)}
            texts = {"role": role, "content": content, **texts}
            return {key: _check_text(v, where) for key, v in texts.items()}
    raise ValueError(
        f"{where}: expected messages with the strings 'role' and 'content', "
        f"received {shorten(repr(message))}. Remove the row, or write what "
        "the message holds instead into 'content' as text."
    )


def _refuse_parts(row: Mapping[Any, Any], parts: set[str], where: str) -> None:
    found = sorted(key for key in parts & set(row) if row[key])
    if found:
        raise ValueError(
            f"{where} has {', '.join(map(repr, found))}, which would be left "
            "out. Write it into the prompt, the messages or their content (a "
            "system prompt as a message of the role 'system'), or remove it."
        )


def _check_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise ValueError(
            f"{where} has half a character (a surrogate, as of an emoji cut "
            f"in two) at {around!r}, which no tokenizer can read. Remove it."
        ) from error
    return text


def _check_prompt(prompt: Prompt, where: str) -> Prompt:
    if isinstance(prompt, str):
        return _check_text(prompt, where)
    return _check_messages(prompt, where)


def _read_pair(prompt: Any, response: Any, where: str) -> Conversation:
    prompt = _check_prompt(prompt, where)
    if isinstance(response, str):
        return _conversation(prompt, response, where)
    if isinstance(prompt, str):
        prompt = ({"role": "user", "content": prompt},)
    response = _check_messages(response, where)
    return _split_messages([*prompt, *response], where, first=len(prompt))


def _split_messages(messages: Any, where: str, first: int = 0) -> Conversation:
    """The last assistant turn, from message `first` on, and what is before."""
    messages = _check_messages(messages, where)
    roles = [message["role"] for message in messages]
    turns = [i for i in range(first, len(roles)) if roles[i] == "assistant"]
    if not turns:
        raise _no_response(
            where,
            f"no assistant turn among the roles {shorten(str(roles[first:]))}",
        )
    last = turns[-1]
    return _conversation(messages[:last], messages[last]["content"], where)


def _conversation(prompt: Prompt, response: str, where: str) -> Conversation:
    if not prompt:
        raise ValueError(
            f"{where} has an empty prompt. Expected text or at least one "
            "message before the response."
        )
    if not response.strip():
        raise _no_response(where, "it is an empty text")
    return Conversation(prompt, _check_text(response, where), where)


def _no_response(where: str, reason: str) -> ValueError:
    return ValueError(
        f"{where} has no response ({reason}). Expected a 'response' or "
        "'completion' text, or a last assistant turn. Remove the row or add "
        "its response."
    )
