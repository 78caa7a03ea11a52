"""An OpenAI-compatible server's answer, as token ids."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from keras_iris.generation.engine import Completion

# What a log-prob of (nearly) certain tokens may be above 0, in nats.
_ROUNDING = 1e-3


def read_completion(
    text: str, end_token_ids: tuple[int, ...], max_new_tokens: int
) -> Completion:
    """Reads the body of a `/completions` response.

    Token ids come from `token_ids` (vLLM, SGLang) or, without them, the `id`
    of each entry of `logprobs.content` (llama.cpp). Text is never tokenised
    again, as that needn't give the ids that were sampled.

    Args:
        text: JSON, one choice in it.
        end_token_ids: A completion ends with the first of these.
        max_new_tokens: What was asked for.

    Returns:
        The completion; its log-probs are `None` if the server gave none, or
        left out the end token's.

    Raises:
        ValueError: If it isn't such an answer, or not a whole one, or a
            token's log-prob isn't one.
    """
    try:
        [choice] = json.loads(text)["choices"]
        reason = choice["finish_reason"]
        token_ids, values = _read_tokens(choice, end_token_ids)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            "The server's answer can't be read "
            f"({type(error).__name__}: {error}). Expected the JSON of an "
            "OpenAI completion with the token ids of one choice, received "
            f"{text[:200]!r}. Check `base_url`, and that the server gives "
            "token ids: vLLM 0.10.2, SGLang or llama.cpp, or newer."
        ) from error
    ends = np.flatnonzero(np.isin(token_ids, end_token_ids))
    token_ids = token_ids[: ends[0] + 1] if len(ends) else token_ids
    if reason == "stop" and not len(ends):
        if len(end_token_ids) != 1:
            raise ValueError(
                "The server left the end token out of its answer, and there "
                f"are {len(end_token_ids)} of them: {end_token_ids}. Use a "
                "server that gives it, or a model with one end token."
            )
        token_ids.append(end_token_ids[0])
    stopped = reason == "stop" or len(ends) > 0
    whole = stopped or (reason == "length" and len(token_ids) == max_new_tokens)
    if not whole or len(token_ids) > max_new_tokens:
        raise ValueError(
            f"The server answered {len(token_ids)} tokens with "
            f"finish_reason={reason!r}, expected an end token or "
            f"{max_new_tokens} tokens. Check that prompt and answer fit the "
            "server's context length."
        )
    log_probs = None
    if values is not None and len(values) >= len(token_ids):
        log_probs = _read_log_probs(values[: len(token_ids)])
    return Completion(
        tuple(token_ids), "stop" if stopped else "length", log_probs
    )


def _read_log_probs(values: Sequence[Any]) -> NDArray[np.float32]:
    """Log-probs in nats as an array, if they are such."""
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
    choice: dict[str, Any], end_token_ids: Sequence[int]
) -> tuple[list[int], list[Any] | None]:
    """Ids and, where there are any, their log-probs."""
    details = choice.get("logprobs") or {}
    entries = details.get("content")
    values = details.get("token_logprobs")
    if entries is not None:
        values = [entry["logprob"] for entry in entries]
    token_ids = choice.get("token_ids")
    if token_ids is None:
        token_ids = [entry["id"] for entry in details["content"]]
    for token_id in token_ids:
        if type(token_id) is not int or token_id < 0:  # True is an int as well
            raise ValueError(f"{token_id!r} isn't a token id")
    has_end = bool(set(token_ids[-1:]) & set(end_token_ids))
    # One of the two may be without the end token.
    if values and len(values) - len(token_ids) not in (0, 1 - 2 * has_end):
        raise ValueError(
            f"{len(values)} log-probs of {len(token_ids)} token ids"
        )
    return list(token_ids), list(values) if values else None
