"""Forward passes of a causal LM with a decoding cache.

A prompt's place in its row is part of the pass: the layers of some models
take a mask of the cached positions, so that prompts may end at one place and
all rows of a batch draw their first token at once. KerasHub's own pass (0.32)
takes none: there prompts begin at one place, and the rows with longer ones
wait for the others.
"""

import abc
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras_hub
import numpy as np
from keras import ops, tree

from keras_iris import backend
from keras_iris.models import decoder_parts
from keras_iris.models.decoder_parts import direct, part

# Decoders of one kind: rotary embeddings, a gated feed-forward network, and
# masks that are the layer's and not its attention's.
_SHIFTABLE = {
    keras_hub.models.LlamaBackbone: decoder_parts.LLAMA,  # and Llama 3
    keras_hub.models.MistralBackbone: decoder_parts.LLAMA,
    keras_hub.models.QwenBackbone: decoder_parts.LLAMA,
    keras_hub.models.Qwen3Backbone: decoder_parts.QWEN3,
}


def cached_forward(causal_lm: Any) -> "CachedForward":
    """The forward pass for a causal LM.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
    """
    return right_aligned(causal_lm) or LeftAligned(causal_lm)


def right_aligned(causal_lm: Any) -> "RightAligned | None":
    """The forward pass where prompts can end at one place, or else `None`."""
    backbone = causal_lm.backbone
    # A Qwen model's window is its attention's and not its mask's.
    has_window = getattr(backbone, "use_sliding_window_attention", False)
    parts = shiftable_parts(type(backbone))
    if parts is None or has_window or _num_ropes(backbone, parts) > 1:
        return None
    return RightAligned(causal_lm, parts)


def _num_ropes(backbone: Any, parts: Mapping[str, str]) -> int:
    """Kinds of rotary embeddings that the layers have."""
    names = ("name", "dtype")
    ropes = [
        part(layer, parts, "rope") for layer in backbone.transformer_layers
    ]
    configs = [rope.get_config() for rope in ropes]
    return len({repr([c[k] for k in c if k not in names]) for c in configs})


def shiftable_parts(backbone_type: type) -> Mapping[str, str] | None:
    """The parts of a backbone's layers; `None` for KerasHub's own pass.

    Args:
        backbone_type: A class of `keras_hub.models`.
    """
    for kind, parts in _SHIFTABLE.items():
        if issubclass(backbone_type, kind):
            return parts
    return None


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


class RightAligned(CachedForward):
    """Layer by layer, with prompts that end at one place.

    Rotary embeddings make attention depend on distances alone, so a row may
    begin anywhere. The cache is a mask, and for each layer its keys and values
    of shape `(batch, heads, total, head width)`: products read them as they
    are. KerasHub's layers (0.32) hold them as `(batch, 2, total, heads, head
    width)`, which every step slices, transposes and stacks again, most of its
    time on a CPU.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
        parts: The table of its layers' parts.
    """

    pads_left = True

    def __init__(self, causal_lm: Any, parts: Mapping[str, str]) -> None:
        super().__init__(causal_lm)
        self._parts = parts

    def prefill(self, token_ids: Any, is_prompt: Any, total: int) -> Any:
        """The cache after the prompts."""
        time = token_ids.shape[1]
        # Padding attends to itself: a softmax over nothing can be NaN.
        itself = ops.equal(ops.arange(time)[:, None], ops.arange(time)[None])
        mask = ops.logical_or(is_prompt[:, None], itself)  # (batch, time, time)
        caches: list[Any] = []

        angles = self._angles(time, start_index=0)

        def attend(layer: Any, hidden_states: Any) -> Any:
            parts = self._project(layer, hidden_states, angles)
            widths = ((0, 0), (0, 0), (0, total - time), (0, 0))
            caches.extend(
                ops.pad(ops.swapaxes(new, 1, 2), widths) for new in parts[1:]
            )
            layer_mask = self._mask(layer, hidden_states, mask, None, 0)
            return self._attend(layer, *parts, layer_mask)

        self._layers(token_ids, attend)
        is_key = ops.pad(
            is_prompt, ((0, 0), (0, total - time)), constant_values=True
        )
        return (is_key, *caches)

    def step(self, token_ids: Any, cache: Any, index: Any) -> tuple[Any, Any]:
        """Logits of the tokens after those at position `index`."""
        is_key, *caches = cache
        old, updated = iter(caches), list[Any]()
        angles = self._angles(1, start_index=index)

        def attend(layer: Any, hidden_states: Any) -> Any:
            query, *new = self._project(layer, hidden_states, angles)
            key, value = (
                backend.write(next(old), index, ops.swapaxes(part, 1, 2))
                for part in new
            )
            updated.extend((key, value))
            mask = self._mask(layer, hidden_states, is_key[:, None], key, index)
            outputs = _attend_once(query, key, value, mask)
            return self._part(layer, "output")(outputs)

        hidden_states = self._layers(token_ids, attend)
        backbone = self.causal_lm.backbone
        hidden_states = backbone.layer_norm(hidden_states)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        return logits[:, 0], (is_key, *updated)

    def branch(self, token_ids: Any, positions: Any, branches: Any) -> Any:
        """Hidden states, for the head, of rows whose texts branch.

        Args:
            token_ids: Integer tensor of shape `(batch, time)`: what texts
                begin with, then what follows it in one text after the other.
            positions: Of tokens in their text, in that shape.
            branches: Numbers of texts, in that shape; 0 for what all begin
                with, and for padding behind them.

        Returns:
            Tensor of shape `(batch, time, width)`.
        """
        place = ops.arange(ops.shape(token_ids)[1])
        is_own = ops.equal(branches[:, :, None], branches[:, None])
        mask = ops.logical_and(
            ops.logical_or(ops.equal(branches, 0)[:, None], is_own),
            ops.greater_equal(place[:, None], place[None]),
        )  # (batch, time, time)
        window = getattr(self.causal_lm.backbone, "sliding_window", None)
        if window is not None:
            distances = positions[:, :, None] - positions[:, None]
            mask = ops.logical_and(mask, ops.less(distances, window))

        angles = self._angles(1, positions=positions)

        def attend(layer: Any, hidden_states: Any) -> Any:
            parts = self._project(layer, hidden_states, angles)
            return self._attend(layer, *parts, mask)

        hidden_states = self._layers(token_ids, attend)
        return self.causal_lm.backbone.layer_norm(hidden_states)

    def _attend(
        self, layer: Any, query: Any, key: Any, value: Any, mask: Any
    ) -> Any:
        """What a layer adds; keys of shape `(batch, time, heads, width)`."""
        groups = query.shape[2] // key.shape[2]
        outputs = self._part(layer, "attend")(
            query,
            ops.repeat(key, groups, axis=2),
            ops.repeat(value, groups, axis=2),
            mask,
        )
        return self._part(layer, "output")(outputs)

    def _layers(self, token_ids: Any, attend: Callable[[Any, Any], Any]) -> Any:
        """Hidden states after all layers; `attend` is their attention."""
        backbone = self.causal_lm.backbone
        hidden_states = backbone.token_embedding(token_ids)
        for layer in backbone.transformer_layers:
            inputs = self._part(layer, "attention_norm")(hidden_states)
            hidden_states = hidden_states + attend(layer, inputs)
            inputs = self._part(layer, "feedforward_norm")(hidden_states)
            gate = ops.cast(self._part(layer, "gate")(inputs), "float32")
            gate = self._part(layer, "activation")(gate)
            gate = ops.cast(gate, layer.compute_dtype)
            inner = self._part(layer, "up")(inputs) * gate
            hidden_states = hidden_states + self._part(layer, "down")(inner)
        return hidden_states

    def _angles(self, time: int, **place: Any) -> tuple[Any, Any]:
        """Cosines and sines of rotary embeddings, the same for all layers.

        Args:
            time: The number of positions.
            **place: `start_index` or `positions`, as rotary embeddings take.
        """
        backbone = self.causal_lm.backbone
        layer = backbone.transformer_layers[0]
        query = part(layer, self._parts, "query")
        width = query.compute_output_shape((1, time, backbone.hidden_dim))[-1]
        inputs = ops.zeros((1, time, 1, width))  # their shape is read
        angles: tuple[Any, Any] = self._part(layer, "angles")(inputs, **place)
        return angles

    def _project(
        self, layer: Any, inputs: Any, angles: tuple[Any, Any]
    ) -> tuple[Any, Any, Any]:
        """Queries, keys and values, `(batch, time, heads, head width)`."""
        query = self._part(layer, "query")(inputs)
        key = self._part(layer, "key")(inputs)
        if "query_norm" in self._parts:
            query = self._part(layer, "query_norm")(query)
            key = self._part(layer, "key_norm")(key)
        rotate = self._part(layer, "rotate")
        return (
            rotate(query, *angles),
            rotate(key, *angles),
            self._part(layer, "value")(inputs),
        )

    def _mask(
        self,
        layer: Any,
        hidden_states: Any,
        is_key: Any,
        cache: Any,
        index: Any,
    ) -> Any:
        """`is_key`, but for what the layer doesn't look at."""
        mask = self._part(layer, "mask")(
            decoder_sequence=hidden_states,
            decoder_padding_mask=None,
            decoder_attention_mask=is_key,
            self_attention_cache=cache,  # of which the third dimension is read
            self_attention_cache_update_index=index,
        )
        return ops.cast(mask, "bool")

    def _part(self, layer: Any, role: str) -> Any:
        return direct(part(layer, self._parts, role))


def _attend_once(query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Attention of one query a row, in groups of heads.

    Args:
        query: Tensor of shape `(batch, 1, heads, width)`.
        key: Tensor of shape `(batch, key heads, total, width)`.
        value: Tensor of that shape.
        mask: Boolean tensor of shape `(batch, 1, total)`.

    Returns:
        Tensor of the shape of `query`.
    """
    batch_size, key_heads, _, width = key.shape
    grouped = ops.reshape(query, (batch_size, key_heads, -1, width))
    scores = ops.matmul(grouped, ops.swapaxes(key, 2, 3))
    scores = ops.cast(scores, "float32") / np.sqrt(width)
    scores = ops.where(mask[:, None], scores, -np.inf)
    weights = ops.cast(ops.softmax(scores), value.dtype)
    return ops.reshape(ops.matmul(weights, value), query.shape)


class LeftAligned(CachedForward):
    """KerasHub's own pass, with prompts that begin at one place."""

    pads_left = False

    def __init__(self, causal_lm: Any) -> None:
        super().__init__(causal_lm)
        # What doesn't decode is seen here, not after a first training.
        try:
            (cache,) = self.prefill(ops.ones((1, 2), "int32"), None, 3)
            index = ops.convert_to_tensor(2, "int32")
            self.step(ops.ones((1, 1), "int32"), (cache,), index)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{type(causal_lm).__name__} can't generate in this process: "
                f"{type(error).__name__}: {error} Expected a decoder whose "
                "cache takes token ids alone. Use another model or engine."
            ) from error

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
            # SmolLM3 takes no plain number.
            start = ops.convert_to_tensor(0, "int32")
            _, _, cache = self.causal_lm.call_with_cache(
                token_ids, cache, start
            )
        finally:
            del head.call
        return (cache,)

    def step(self, token_ids: Any, cache: Any, index: Any) -> tuple[Any, Any]:
        """Logits of the tokens after those at position `index`."""
        logits, _, updated = self.causal_lm.call_with_cache(
            token_ids, cache[0], index
        )
        return logits[:, 0], (updated,)

    def _empty_cache(self, batch_size: int, total: int) -> Any:
        """Zeros, as many and of the shapes that the model takes."""
        # `_build_cache` (KerasHub 0.32) alone knows them; what it takes beside
        # token ids is for images. Two tokens are the fewest that Keras'
        # softmax takes without a warning.
        build = self.causal_lm._build_cache
        others = [None] * (len(inspect.signature(build).parameters) - 1)
        _, small = build(ops.zeros((batch_size, 2), "int32"), *others)

        def lengthen(tensor: Any) -> Any:  # (..., time, heads, head width)
            *outer, _, heads, width = tensor.shape
            return ops.zeros((*outer, total, heads, width), tensor.dtype)

        return tree.map_structure(lengthen, small)
