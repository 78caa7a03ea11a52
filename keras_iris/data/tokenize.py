"""Conversations to token ids: one path for generation and for training.

The prompt's ids don't depend on the response, so the ids that generation
starts from are the ids that training conditions on.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import Conversation, Message, Prompt
from keras_iris.data.example import Example
from keras_iris.data.marked_text import MarkedText
from keras_iris.data.tokenizer import Tokenizer

OnOverflow = Literal["drop", "truncate", "error"]
_OVERFLOWS = ("drop", "truncate", "error")


def tokenize(  # noqa: PLR0913
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    template: ChatTemplate | None = None,
    max_prompt_length: int,
    max_response_length: int,
    on_overflow: OnOverflow = "drop",
) -> list[Example]:
    """Turns conversations into token ids.

    With a template the prompt is the rendered prompt, and the response ends
    with the template's end of turn: the ids after the first end token (a
    newline in some templates) are left out. Where the template writes no end
    token, and without a template, `tokenizer.end_token_ids[0]` is appended.
    Special tokens inside a user's text stay text.

    Args:
        conversations: What to tokenise.
        tokenizer: A `Tokenizer`.
        template: Renders the messages; a prompt that is a string becomes a
            user message. Without one, prompts have to be strings, and are
            taken as they stand.
        max_prompt_length: Longer prompts lose ids on the left, with one
            warning that counts them.
        max_response_length: The longest response in tokens, with the end
            token.
        on_overflow: What happens to longer responses: `"drop"` leaves the
            conversation out, `"truncate"` cuts the response, which then has
            no end token (both with one warning that counts them), `"error"`
            raises.

    Returns:
        The examples, in the order of the conversations.

    Raises:
        ValueError: If an argument is out of range, a conversation cannot be
            rendered or has an empty prompt, the template ends a turn with
            a special token that generation doesn't stop at, a response is too
            long and `on_overflow="error"`, or nothing is left.
    """
    _check_arguments(max_prompt_length, max_response_length, on_overflow)
    examples, num_cut, too_long = [], 0, []
    for index, conversation in enumerate(conversations):
        try:
            prompt_ids, response_ids = _encode(
                conversation, tokenizer, template
            )
        except ValueError as error:
            raise ValueError(f"Conversation {index}: {error}") from error
        if len(prompt_ids) > max_prompt_length:
            num_cut += 1
        if len(response_ids) > max_response_length:
            too_long.append((index, len(response_ids)))
            if on_overflow == "drop":
                continue
        examples.append(
            Example(
                np.asarray(prompt_ids[-max_prompt_length:], np.int32),
                np.asarray(response_ids[:max_response_length], np.int32),
            )
        )
    total = len(conversations)
    _report_prompts(num_cut, total, max_prompt_length)
    _report_responses(too_long, total, max_response_length, on_overflow)
    if not examples:
        raise ValueError(
            f"No example is left of {total} conversations. Expected at least "
            f"one with a response of at most {max_response_length} tokens. "
            "Raise `max_response_length`, or check that the data isn't empty."
        )
    return examples


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The ids that a response is generated from: those `tokenize` gives.

    Args:
        prompt: A string, or messages.
        tokenizer: A `Tokenizer`.
        template: Renders the messages.

    Returns:
        Token ids, at least one.

    Raises:
        ValueError: If the prompt cannot be rendered or has no ids.
    """
    if template is None:
        token_ids = tokenizer.encode(_as_text(prompt), parse_special=False)
    else:
        marked = MarkedText(_as_messages(prompt), tokenizer)
        token_ids = marked.encode(template.render_prompt(marked.messages))
    if not token_ids:
        raise ValueError(
            f"The prompt {prompt!r} has no token ids. Expected at least one, "
            "which the first token of the response is predicted from."
        )
    return token_ids


def _encode(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> tuple[list[int], list[int]]:
    prompt, response = conversation.prompt, conversation.response
    prompt_ids = encode_prompt(prompt, tokenizer, template)
    if template is None:
        rest = tokenizer.encode(response, parse_special=False)
    else:
        rest = _encode_rest(
            _as_messages(prompt), response, prompt_ids, tokenizer, template
        )
    return prompt_ids, _close(rest, tokenizer.end_token_ids)


def _encode_rest(
    messages: Sequence[Message],
    response: str,
    prompt_ids: list[int],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> list[int]:
    turn = {"role": "assistant", "content": response}
    marked = MarkedText([*messages, turn], tokenizer)
    *history, turn = marked.messages
    prompt = template.render_prompt(history)
    full = template.render(history, turn["content"])
    full_ids = marked.encode(full)
    if full_ids[: len(prompt_ids)] == prompt_ids:
        rest_ids = full_ids[len(prompt_ids) :]
    else:
        # A token spans prompt and response: generation never sees that one.
        rest_ids = marked.encode(full[len(prompt) :], continues=True)
    if set(rest_ids).isdisjoint(tokenizer.end_token_ids):
        _check_end_of_turn(full[len(prompt) :], tokenizer)
    return rest_ids


def _check_end_of_turn(rest: str, tokenizer: Tokenizer) -> None:
    written = [token for token in tokenizer.special_tokens if token in rest]
    if written:
        raise ValueError(
            f"The chat template ends a response with {written}, which isn't "
            "an end token of the tokenizer, so generation would not stop "
            f"there: its end tokens are {tokenizer.end_token_ids}. Add the "
            "token's id to `end_token_ids`, or use another template."
        )


def _close(token_ids: list[int], end_token_ids: tuple[int, ...]) -> list[int]:
    """Ids up to the first end token, which is appended if there is none."""
    for position, token_id in enumerate(token_ids):
        if token_id in end_token_ids:
            return token_ids[: position + 1]
    return [*token_ids, end_token_ids[0]]


def _as_messages(prompt: Prompt) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return prompt


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ValueError(
        f"The prompt is a list of {len(prompt)} messages, expected a string, "
        "because there is no chat template. Pass a template, for instance "
        "`template=ChatTemplate.named('chatml')`."
    )


def _check_arguments(
    max_prompt_length: int, max_response_length: int, on_overflow: str
) -> None:
    if max_prompt_length < 1 or max_response_length < 1:
        raise ValueError(
            "Expected `max_prompt_length` and `max_response_length` of at "
            f"least 1, received {max_prompt_length} and "
            f"{max_response_length}."
        )
    if on_overflow not in _OVERFLOWS:
        raise ValueError(
            f"Expected `on_overflow` to be one of {_OVERFLOWS}, received "
            f"{on_overflow!r}."
        )


def _report_prompts(num_cut: int, total: int, maximum: int) -> None:
    if num_cut:
        warnings.warn(
            f"{num_cut} of {total} prompts are longer than "
            f"`max_prompt_length` = {maximum} tokens and were cut on the "
            "left.",
            stacklevel=3,
        )


def _report_responses(
    too_long: list[tuple[int, int]],
    total: int,
    maximum: int,
    on_overflow: OnOverflow,
) -> None:
    if not too_long:
        return
    found = (
        f"{len(too_long)} of {total} responses are longer than "
        f"`max_response_length` = {maximum} tokens"
    )
    if on_overflow == "error":
        index, length = too_long[0]
        raise ValueError(
            f"{found}, first that of conversation {index} with {length}. "
            "Raise the maximum, or pass `on_overflow='drop'` or 'truncate'."
        )
    outcome = {
        "drop": "and were dropped with their prompts.",
        "truncate": "and were cut; they have no end token now.",
    }
    warnings.warn(f"{found} {outcome[on_overflow]}", stacklevel=3)
