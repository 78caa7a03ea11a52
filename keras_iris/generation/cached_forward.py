"""Forward passes of a causal LM with a decoding cache.

A prompt's place in its row is part of the pass: the layers of some models
take a mask of the cached positions, so that prompts may end at one place and
all rows of a batch draw their first token at once. KerasHub's own pass (0.32)
takes none: there prompts begin at one place, and the rows with longer ones
wait for the others.
"""

import abc
from typing import Any

import keras_hub
from keras import ops

# Rotary embeddings of the position alone, and layers that take a mask.
_SHIFTABLE = (
    keras_hub.models.LlamaBackbone,  # and Llama 3
    keras_hub.models.MistralBackbone,
    keras_hub.models.QwenBackbone,
)


def cached_forward(causal_lm: Any) -> "CachedForward":
    """The forward pass for a causal LM.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
    """
    if isinstance(causal_lm.backbone, _SHIFTABLE):
        return RightAligned(causal_lm)
    return LeftAligned(causal_lm)


class CachedForward(abc.ABC):
    """A forward pass with a cache.

    Attributes:
        pads_left: Whether prompts are padded on the left.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
    """

    pads_left: bool

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm = causal_lm

    @abc.abstractmethod
    def prefill(self, token_ids: Any, is_prompt: Any, total: int) -> Any:
        """The cache after the prompts.

        Args:
            token_ids: Integer tensor of shape `(batch, time)`.
            is_prompt: Boolean tensor of that shape; true where `token_ids`
                isn't padding.
            total: Positions that the cache has room for.

        Returns:
            Tensors, in a tuple.
        """

    @abc.abstractmethod
    def step(self, token_ids: Any, cache: Any, index: Any) -> tuple[Any, Any]:
        """Logits of the tokens after those at position `index`.

        Args:
            token_ids: Integer tensor of shape `(batch, 1)`.
            cache: What `prefill` or the last `step` gave.
            index: Integer scalar.

        Returns:
            Logits of shape `(batch, vocabulary)`, and the next cache.
        """

    def _empty_cache(self, batch_size: int, total: int) -> Any:
        """Zeros of shape (batch, layers, 2, total, heads, head width)."""
        # `_build_cache` (KerasHub 0.32) alone knows the shape. Two tokens are
        # the fewest that Keras' softmax takes without a warning.
        start = ops.zeros((batch_size, 2), "int32")
        _, small = self.causal_lm._build_cache(start)
        shape = list(small.shape)
        shape[3] = total
        return ops.zeros(shape, small.dtype)


class RightAligned(CachedForward):
    """Layer by layer, with prompts that end at one place.

    Rotary embeddings make attention depend on distances alone, so a row may
    begin anywhere. The cache is a tensor for each layer, and a mask.
    """

    pads_left = True

    def prefill(self, token_ids: Any, is_prompt: Any, total: int) -> Any:
        """The cache after the prompts."""
        batch_size, time = token_ids.shape
        is_key = ops.pad(
            is_prompt, ((0, 0), (0, total - time)), constant_values=True
        )
        # Padding attends to itself: a softmax over nothing can be NaN.
        itself = ops.equal(ops.arange(time)[:, None], ops.arange(total)[None])
        mask = ops.logical_or(is_key[:, None], itself)  # (batch, time, total)
        empty = self._empty_cache(batch_size, total)
        caches = [empty[:, i] for i in range(empty.shape[1])]
        _, caches = self._layers(token_ids, caches, mask, 0)
        return (is_key, *caches)

    def step(self, token_ids: Any, cache: Any, index: Any) -> tuple[Any, Any]:
        """Logits of the tokens after those at position `index`."""
        is_key, *caches = cache
        backbone = self.causal_lm.backbone
        hidden_states, caches = self._layers(
            token_ids, caches, is_key[:, None], index
        )
        hidden_states = backbone.layer_norm(hidden_states)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        return logits[:, 0], (is_key, *caches)

    def _layers(
        self, token_ids: Any, caches: list[Any], mask: Any, index: Any
    ) -> tuple[Any, list[Any]]:
        backbone = self.causal_lm.backbone
        hidden_states = backbone.token_embedding(token_ids)
        updated = []
        for layer, cache in zip(
            backbone.transformer_layers, caches, strict=True
        ):
            hidden_states, cache = layer(
                hidden_states,
                decoder_attention_mask=mask,
                self_attention_cache=cache,
                self_attention_cache_update_index=index,
            )
            updated.append(cache)
        return hidden_states, updated


class LeftAligned(CachedForward):
    """KerasHub's own pass, with prompts that begin at one place."""

    pads_left = False

    def prefill(self, token_ids: Any, is_prompt: Any, total: int) -> Any:
        """The cache after the prompts, and after the padding behind them."""
        del is_prompt  # what is behind a prompt is overwritten
        cache = self._empty_cache(token_ids.shape[0], total)
        # The head would compute (batch, time, vocabulary) numbers, and sees
        # the last position only. XLA drops even that.
        head = self.causal_lm.backbone.token_embedding
        call = head.call

        def call_on_last(inputs: Any, reverse: bool = False) -> Any:
            return call(inputs[:, -1:] if reverse else inputs, reverse=reverse)

        head.call = call_on_last
        try:
            _, _, cache = self.causal_lm.call_with_cache(token_ids, cache, 0)
        finally:
            del head.call
        return (cache,)

    def step(self, token_ids: Any, cache: Any, index: Any) -> tuple[Any, Any]:
        """Logits of the tokens after those at position `index`."""
        logits, _, updated = self.causal_lm.call_with_cache(
            token_ids, cache[0], index
        )
        return logits[:, 0], (updated,)
