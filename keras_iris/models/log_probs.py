"""Log-probs of responses without the logits of the whole sequence."""

from typing import Any

import keras
from keras import ops

from keras_iris import backend
from keras_iris.models.checks import check_head

Tensor = Any

# Tokens and outputs whose logits are held at a time: 16 MiB of float32, which
# fits into a processor's cache, and 256 MiB, which keeps a GPU busy. Tokens
# that no response has are left out in chunks of this size.
_CPU_TILE = (512, 8192)
_GPU_TILE = (2048, 32768)


def sequence_log_probs(
    hidden_states: Tensor,
    token_ids: Tensor,
    response_mask: Tensor,
    *,
    head: keras.layers.ReversibleEmbedding,
) -> Tensor:
    """Log-probs of responses, summed over their tokens, in nats.

    The hidden state at position `t - 1` predicts the token at `t`. Logits of
    shape `(tokens, vocabulary)` never exist: they are made, and made again in
    the backward pass, for a block of the vocabulary and some of the tokens at
    a time. Positions that predict no response token are left out. Whatever
    the compute dtype, the log-softmax and the sums are float32; in bfloat16
    TensorFlow and PyTorch round the logits to it first, JAX doesn't.

    Args:
        hidden_states: Tensor of shape `(rows, time, width)`.
        token_ids: Integer tensor of shape `(rows, time)`.
        response_mask: Boolean tensor of shape `(rows, time)`; true where
            `token_ids` holds a token of the response, its end token
            included. The first position of a row predicts nothing and can't
            be part of a response.
        head: The output layer, whose matrix, dtype and `logit_soft_cap` are
            taken. Its matrix gets a gradient if it is trainable.

    Returns:
        Float32 tensor of shape `(rows,)`.
    """
    log_probs = token_log_probs(
        hidden_states, token_ids, response_mask, head=head
    )
    return ops.sum(log_probs, axis=1)


def token_log_probs(
    hidden_states: Tensor,
    token_ids: Tensor,
    response_mask: Tensor,
    *,
    head: keras.layers.ReversibleEmbedding,
) -> Tensor:
    """Log-probs of the tokens of responses, in nats.

    As `sequence_log_probs`, but not summed.

    Args:
        hidden_states: As in `sequence_log_probs`.
        token_ids: As in `sequence_log_probs`.
        response_mask: As in `sequence_log_probs`.
        head: As in `sequence_log_probs`.

    Returns:
        Float32 tensor of shape `(rows, time - 1)`, for the tokens from the
        second position on; 0 where they are not the response's.
    """
    rows, time = ops.shape(token_ids)  # tensors where TensorFlow traces
    num_tokens = rows * (time - 1)
    if isinstance(num_tokens, int) and num_tokens == 0:
        return ops.zeros((rows, time - 1), "float32")
    hidden_states = ops.reshape(
        hidden_states[:, :-1], (num_tokens, hidden_states.shape[-1])
    )
    hidden_states = ops.cast(
        hidden_states, head.reverse_dtype or head.compute_dtype
    )
    token_ids = ops.reshape(token_ids[:, 1:], (num_tokens,))
    mask = ops.reshape(ops.cast(response_mask[:, 1:], "int32"), (num_tokens,))
    tile = _CPU_TILE if backend.is_on_cpu(hidden_states) else _GPU_TILE
    table, options = _table(head), _options(head, num_tokens, tile)
    if _is_data_parallel():
        # Sorted, every device would get and compute the tokens of all.
        log_probs = backend.head_log_probs(
            hidden_states, table, token_ids, num_tokens, options
        )
    else:
        # Response tokens first, so that the rest is a block.
        order = ops.argsort(1 - mask)
        log_probs = backend.head_log_probs(
            ops.take(hidden_states, order, axis=0),
            table,
            ops.take(token_ids, order, axis=0),
            ops.sum(mask),
            options,
        )
        log_probs = ops.take(log_probs, ops.argsort(order), axis=0)
    # `where`, not a product: what isn't a response's may be anything.
    log_probs = ops.where(mask > 0, log_probs, 0.0)
    return ops.reshape(log_probs, (rows, time - 1))


def _table(head: keras.layers.ReversibleEmbedding) -> Tensor:
    """The matrix `(vocabulary, width)` as it is stored: blocks are cast."""
    check_head(head)
    with backend.AutocastScope(None):
        if head.tie_weights:
            return ops.convert_to_tensor(head.embeddings)
        return ops.transpose(head.reverse_embeddings)


def _options(
    head: keras.layers.ReversibleEmbedding,
    num_tokens: Any,
    tile: tuple[int, int],
) -> backend.HeadOptions:
    tile_tokens, tile_outputs = tile
    if isinstance(num_tokens, int):
        tile_tokens = min(tile_tokens, num_tokens)
    distribution = keras.distribution.distribution()
    if isinstance(distribution, keras.distribution.ModelParallel):
        # The vocabulary is cut over devices already, and each has its share
        # of every block.
        tile_outputs = head.input_dim
    options = backend.HeadOptions(
        tile_tokens=tile_tokens,
        tile_outputs=tile_outputs,
        soft_cap=head.logit_soft_cap,
        is_trained=bool(head.trainable_variables),
    )
    if _is_data_parallel():
        # The tokens are cut over devices already.
        options = options.with_all_tokens(num_tokens)
    return options


def _is_data_parallel() -> bool:
    """Whether each device has the whole model and some rows of the batch."""
    distribution = keras.distribution.distribution()
    return (
        isinstance(distribution, keras.distribution.DataParallel)
        and distribution.device_mesh.devices.size > 1
    )
