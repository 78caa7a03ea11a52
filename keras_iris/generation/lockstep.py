"""KerasHub's own decoding pass, for models whose parts we don't know.

It (0.32) takes no mask of the cached tokens: all rows are at one position. They
begin together, and those with longer prompts wait for the others.
"""

from typing import Any

from keras import ops, tree

from keras_iris import backend
from keras_iris.generation.cached_forward import CachedForward
from keras_iris.models.decoder_parts import build_cache


class Lockstep(CachedForward):
    """KerasHub's own pass, with all rows at one position."""

    is_rowwise = False

    def __init__(self, causal_lm: Any) -> None:
        super().__init__(causal_lm)
        # What doesn't decode is seen here, not after a first training.
        try:
            rows = backend.num_row_shares()
            lengths = ops.full((rows,), 2, "int32")
            cache = self.prefill(ops.ones((rows, 2), "int32"), lengths, 3)
            self.step(ops.ones((rows, 1), "int32"), cache, lengths, None)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{type(causal_lm).__name__} can't generate in this process: "
                f"{type(error).__name__}: {error} Expected a decoder whose "
                "cache takes token ids alone. Use another model or engine."
            ) from error

    def empty(self, num_rows: int, total: int) -> Any:
        """A cache without tokens."""
        return (self._empty_cache(num_rows, total),)

    def first_positions(self, lengths: Any) -> Any:
        """That of the shortest prompt's last token; the others' go on."""
        return ops.broadcast_to(ops.min(lengths) - 1, lengths.shape)

    def prefill(self, token_ids: Any, lengths: Any, total: int) -> Any:
        """The cache after the prompts, and after the padding behind them."""
        del lengths  # what is behind a prompt is overwritten
        cache = self._empty_cache(token_ids.shape[0], total)
        # The head would compute (batch, time, vocabulary) numbers, and sees
        # the last position only. XLA drops even that.
        head = self.causal_lm.backbone.token_embedding
        call = head.call

        def call_on_last(inputs: Any, reverse: bool = False) -> Any:
            return call(inputs[:, -1:] if reverse else inputs, reverse=reverse)

        head.call = call_on_last
        try:
            # SmolLM3 takes no plain number.
            start = ops.convert_to_tensor(0, "int32")
            _, _, cache = self.causal_lm.call_with_cache(
                token_ids, cache, start
            )
        finally:
            del head.call
        return (cache,)

    def step(
        self, token_ids: Any, cache: Any, positions: Any, column: Any
    ) -> tuple[Any, Any]:
        """Logits of the tokens after those given, all at one position."""
        del column
        logits, _, updated = self.causal_lm.call_with_cache(
            token_ids, cache[0], positions[0]
        )
        return logits[:, 0], (updated,)

    def _empty_cache(self, batch_size: int, total: int) -> Any:
        """Zeros, as many and of the shapes that the model takes."""
        # Two tokens are the fewest that Keras' softmax takes without warning.
        two = ops.zeros((batch_size, 2), "int32")
        small = build_cache(self.causal_lm, two)

        def lengthen(tensor: Any) -> Any:  # (..., time, heads, head width)
            *outer, _, heads, width = tensor.shape
            return ops.zeros((*outer, total, heads, width), tensor.dtype)

        return tree.map_structure(lengthen, small)
