"""An OpenAI-compatible server's answer, as token ids."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_iris.data import Tokenizer
from keras_iris.generation.engine import Completion

_TOKEN_ID_PREFIX = "token_id:"
# What a log-prob of (nearly) certain tokens may be above 0, in nats.
_ROUNDING = 1e-3


def read_completion(
    text: str, tokenizer: Tokenizer, max_new_tokens: int
) -> Completion:
    """Reads the body of a `/completions` response.

    Token ids come from, in this order: `token_ids` (vLLM, SGLang); the `id`
    of each entry of `logprobs.content` (llama.cpp); `logprobs.tokens` of the
    form `token_id:7` (vLLM); the texts in `logprobs.tokens`, if the tokeniser
    makes exactly one token of each. The text of the whole answer is never
    tokenised again, as that needn't give the ids that were sampled.

    Args:
        text: JSON, one choice in it.
        tokenizer: That of the model.
        max_new_tokens: What was asked for.

    Returns:
        The completion; its log-probs are `None` if the server gave none, or
        left out the end token.

    Raises:
        ValueError: If it isn't such an answer, or not a whole one, or a
            token's log-prob isn't one.
    """
    try:
        choice = json.loads(text)["choices"][0]
        reason = choice["finish_reason"]
        token_ids, values = _read_tokens(choice, tokenizer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            "The server's answer can't be read "
            f"({type(error).__name__}: {error}). Expected the JSON of an "
            "OpenAI completion with the token ids of one choice, received "
            f"{_shorten(text)}. Check `base_url`, and that the server gives "
            "token ids or log-probs."
        ) from error
    ends = tokenizer.end_token_ids
    token_ids = _up_to_end(token_ids, ends)
    stopped = reason == "stop" or (bool(token_ids) and token_ids[-1] in ends)
    if stopped and (not token_ids or token_ids[-1] not in ends):
        token_ids = token_ids + _only_end(ends)
    whole = stopped or (reason == "length" and len(token_ids) == max_new_tokens)
    if not whole or len(token_ids) > max_new_tokens + stopped:
        raise ValueError(
            f"The server answered {len(token_ids)} tokens with "
            f"finish_reason={reason!r}, expected an end token or "
            f"{max_new_tokens} tokens. Check that prompt and answer fit the "
            "server's context length."
        )
    log_probs = None
    if values is not None and len(values) >= len(token_ids):
        log_probs = read_log_probs(values[: len(token_ids)])
    return Completion(
        tuple(token_ids), "stop" if stopped else "length", log_probs
    )


def read_log_probs(values: Sequence[Any]) -> NDArray[np.float32]:
    """Checks what an engine gives as the log-probs of a completion.

    Args:
        values: One for each token, in nats.

    Returns:
        The same, of shape `(len(values),)`.

    Raises:
        ValueError: If one isn't a number, not finite, or above 0.
    """
    for place, value in enumerate(values):
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if not is_number or value > _ROUNDING:
            raise ValueError(
                f"Token {place} (from 0) of a completion of {len(values)} has "
                f"log-prob {value!r}. Expected a finite number of nats, at "
                "most 0. Check the engine's model and number type: infinite "
                "or NaN logits give such."
            )
    return np.array(values, "float32")


def _read_tokens(
    choice: dict[str, Any], tokenizer: Tokenizer
) -> tuple[list[int], list[Any] | None]:
    """Ids and, where there are any, their log-probs."""
    details = choice.get("logprobs") or {}
    entries = details.get("content")
    values: Any = details.get("token_logprobs")
    if entries is not None:
        values = [entry["logprob"] for entry in entries]
    values = None if values is None else list(values)
    if choice.get("token_ids") is not None:
        return [_check_id(i) for i in choice["token_ids"]], values
    if entries is not None:
        return [_check_id(entry["id"]) for entry in entries], values
    tokens = details["tokens"]
    return [_read_token(token, tokenizer) for token in tokens], values


def _check_id(value: Any) -> int:
    if type(value) is not int or value < 0:  # True is an int as well
        raise ValueError(f"{value!r} isn't a token id")
    return value


def _read_token(token: str, tokenizer: Tokenizer) -> int:
    if token.startswith(_TOKEN_ID_PREFIX):
        return _check_id(int(token.removeprefix(_TOKEN_ID_PREFIX)))
    token_ids = tokenizer.encode(token)
    if len(token_ids) != 1:
        raise ValueError(
            f"the server gives only texts, and {token!r} is {len(token_ids)} "
            "tokens to the tokeniser"
        )
    return token_ids[0]


def _up_to_end(token_ids: list[int], ends: tuple[int, ...]) -> list[int]:
    for position, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: position + 1]
    return token_ids


def _only_end(ends: tuple[int, ...]) -> list[int]:
    if len(ends) != 1:
        raise ValueError(
            "The server left the end token out of its answer, and the "
            f"tokeniser has {len(ends)} of them: {ends}. Use a server that "
            "gives token ids, or a tokeniser with one end token."
        )
    return [ends[0]]


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "...")
