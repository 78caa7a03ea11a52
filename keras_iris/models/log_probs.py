"""Sequence log-probs without the logits of the whole sequence."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_iris import backend

Tensor = Any

# Logits held at a time: 2^24 float32 values are 64 MiB, and their gradient as
# much again. Of the last chunk, half is padding in the mean.
_MAX_LOGITS = 2**24
_MIN_CHUNK_TOKENS = 256
_MAX_CHUNK_TOKENS = 4096


def sequence_log_probs(
    hidden_states: Tensor,
    token_ids: Tensor,
    response_mask: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    vocabulary_size: int,
) -> Tensor:
    """Log-probs of responses, summed over their tokens, in nats.

    The hidden state at position `t - 1` predicts the token at `t`. The head
    and the log-softmax run over chunks of tokens, each recomputed in the
    backward pass, so that logits of shape `(tokens, vocabulary)` never exist;
    the positions that predict no response token are left out. Whatever the
    compute dtype, the log-softmax and the sums are float32.

    Args:
        hidden_states: Tensor of shape `(rows, time, width)`.
        token_ids: Integer tensor of shape `(rows, time)`.
        response_mask: Boolean tensor of shape `(rows, time)`; true where
            `token_ids` holds a token of the response, its end token
            included. The first position of a row predicts nothing and can't
            be part of a response.
        head: Maps hidden states `(n, width)` to logits
            `(n, vocabulary_size)`.
        vocabulary_size: Number of logits.

    Returns:
        Float32 tensor of shape `(rows,)`.
    """
    rows, time = ops.shape(token_ids)  # tensors where TensorFlow traces
    return _sum_log_probs(
        (hidden_states, token_ids, response_mask),
        ops.repeat(ops.arange(rows), time - 1),
        rows,
        head,
        vocabulary_size,
    )


def token_log_probs(
    hidden_states: Tensor,
    token_ids: Tensor,
    response_mask: Tensor,
    *,
    head: Callable[[Tensor], Tensor],
    vocabulary_size: int,
) -> Tensor:
    """Log-probs of the tokens of responses, in nats.

    As `sequence_log_probs`, but not summed, and meant for few rows.

    Args:
        hidden_states: As in `sequence_log_probs`.
        token_ids: As there.
        response_mask: As there.
        head: As there.
        vocabulary_size: As there.

    Returns:
        Float32 tensor of shape `(rows, time - 1)`, for the tokens from the
        second position on; 0 where they are not the response's.
    """
    rows, time = ops.shape(token_ids)
    num_tokens = rows * (time - 1)
    log_probs = _sum_log_probs(
        (hidden_states, token_ids, response_mask),
        ops.arange(num_tokens),
        num_tokens,
        head,
        vocabulary_size,
    )
    return ops.reshape(log_probs, (rows, time - 1))


def _sum_log_probs(
    inputs: tuple[Tensor, Tensor, Tensor],
    segment: Tensor,
    num_segments: Any,
    head: Callable[[Tensor], Tensor],
    vocabulary_size: int,
) -> Tensor:
    """Sums over segments; `segment` tells that of each token."""
    hidden_states, token_ids, response_mask = inputs
    width = hidden_states.shape[-1]
    hidden_states = ops.reshape(hidden_states[:, :-1], (-1, width))
    token_ids = ops.reshape(token_ids[:, 1:], (-1,))
    mask = ops.reshape(ops.cast(response_mask[:, 1:], "float32"), (-1,))

    def sums(hidden: Tensor, ids: Tensor, segment: Tensor, mask: Tensor) -> Any:
        logits = ops.cast(head(hidden), "float32")  # (n, vocabulary)
        log_probs = backend.token_log_probs(logits, ids)
        # `where`, not a product: a padding position may hold -inf.
        log_probs = ops.where(mask > 0, log_probs, 0.0)
        return ops.segment_sum(log_probs, segment, num_segments=num_segments)

    arrays = (hidden_states, token_ids, segment, mask)
    size = _chunk_size(vocabulary_size)
    num_tokens = ops.shape(mask)[0]
    if isinstance(num_tokens, int) and num_tokens <= size:
        return sums(*arrays)
    # Response tokens first, so that the chunks behind them are empty.
    order = ops.argsort(1.0 - mask)
    chunks = (_chunks(ops.take(a, order, axis=0), size) for a in arrays)
    return backend.sum_chunks(sums, tuple(chunks))


def _chunk_size(vocabulary_size: int) -> int:
    """Tokens that go through the head at a time."""
    tokens = max(_MIN_CHUNK_TOKENS, _MAX_LOGITS // vocabulary_size)
    return min(_MAX_CHUNK_TOKENS, tokens)


def _chunks(array: Tensor, size: int) -> Tensor:
    """Cuts `(tokens, ...)` into `(num_chunks, size, ...)`."""
    num_tokens, *rest = ops.shape(array)
    padding = ops.zeros((-num_tokens % size, *rest), array.dtype)
    array = ops.concatenate([array, padding])
    return ops.reshape(array, (-1, size, *rest))
