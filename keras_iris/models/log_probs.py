"""Sequence log-probs without the logits of the whole sequence."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_iris import backend

Tensor = Any

# Logits held at a time: 2^25 float32 values are 128 MiB, and their gradient
# as much again.
_MAX_LOGITS = 2**25
_MIN_CHUNK_TOKENS = 256


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
        head: Maps hidden states `(rows, n, width)` to logits
            `(rows, n, vocabulary_size)`.
        vocabulary_size: Number of logits.

    Returns:
        Float32 tensor of shape `(rows,)`.
    """
    hidden_states = hidden_states[:, :-1]
    token_ids = token_ids[:, 1:]
    mask = ops.cast(response_mask[:, 1:], "float32")

    def chunk_sum(hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        logits = ops.cast(head(hidden), "float32")  # (rows, n, vocabulary)
        chosen = ops.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        log_probs = chosen - ops.logsumexp(logits, axis=-1)
        # `where`, not a product: a padding position may hold -inf.
        return ops.sum(ops.where(mask > 0, log_probs, 0.0), axis=-1)

    rows, time, _ = hidden_states.shape
    length = _chunk_length(rows, vocabulary_size)
    # TensorFlow may not know the shape when it traces.
    if time is None or length >= time:
        return chunk_sum(hidden_states, token_ids, mask)
    # Response positions first, so that the chunks behind them are empty.
    order = ops.argsort(1.0 - mask, axis=1)
    arrays = (
        ops.take_along_axis(hidden_states, order[..., None], axis=1),
        ops.take_along_axis(token_ids, order, axis=1),
        ops.take_along_axis(mask, order, axis=1),
    )
    return backend.sum_chunks(
        chunk_sum, tuple(_chunks(array, length) for array in arrays)
    )


def _chunk_length(rows: int | None, vocabulary_size: int) -> int:
    """Positions of every row that go through the head at a time."""
    tokens = max(_MIN_CHUNK_TOKENS, _MAX_LOGITS // vocabulary_size)
    return max(1, tokens // (rows or 16))


def _chunks(array: Tensor, length: int) -> Tensor:
    """Cuts `(rows, time, ...)` into `(num_chunks, rows, length, ...)`."""
    time, *rest = array.shape[1:]
    num_chunks = -(-time // length)
    widths = [(0, 0), (0, num_chunks * length - time)] + [(0, 0)] * len(rest)
    shape = (ops.shape(array)[0], num_chunks, length, *rest)
    array = ops.reshape(ops.pad(array, widths), shape)
    return ops.moveaxis(array, 1, 0)
