"""A decoding pass in which each row of a batch has positions of its own.

Prompts of any length draw their first tokens at once, and a row that is over
makes room for the next prompt. It goes layer by layer through decoders whose
parts it knows; others have `keras_iris.generation.lockstep`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.generation.cached_forward import CachedForward
from keras_iris.models import decoder_parts
from keras_iris.models.decoder_parts import direct, part

# Decoders of one kind: rotary embeddings, a gated feed-forward network, and
# attention to all tokens before or to a window of them.
_ROWWISE = {
    keras_hub.models.LlamaBackbone: decoder_parts.LLAMA,  # and Llama 3
    keras_hub.models.MistralBackbone: decoder_parts.LLAMA,
    keras_hub.models.QwenBackbone: decoder_parts.LLAMA,
    keras_hub.models.Qwen3Backbone: decoder_parts.QWEN3,
}
# The position of no token: behind all others.
_NOWHERE = 2**30
# Tokens of a prompt that are read at a time, and the fewest of all prompts.
BLOCK = 64
_TOKENS = 256


def rowwise(causal_lm: Any) -> "Rowwise | None":
    """The forward pass of rows on their own, or `None` if there is none."""
    backbone = causal_lm.backbone
    # `_sees` knows Mistral's window; a Qwen model's is its attention's own.
    has_window = getattr(backbone, "use_sliding_window_attention", False)
    parts = rowwise_parts(type(backbone))
    if parts is None or has_window or _num_ropes(backbone, parts) > 1:
        return None
    return Rowwise(causal_lm, parts)


def _num_ropes(backbone: Any, parts: Mapping[str, str]) -> int:
    """Kinds of rotary embeddings that the layers have."""
    names = ("name", "dtype")
    ropes = [
        part(layer, parts, "rope") for layer in backbone.transformer_layers
    ]
    configs = [rope.get_config() for rope in ropes]
    return len({repr([c[k] for k in c if k not in names]) for c in configs})


def rowwise_parts(backbone_type: type) -> Mapping[str, str] | None:
    """The parts of a backbone's layers; `None` for KerasHub's own pass.

    Args:
        backbone_type: A class of `keras_hub.models`.
    """
    for kind, parts in _ROWWISE.items():
        if issubclass(backbone_type, kind):
            return parts
    return None


class Rowwise(CachedForward):
    """Layer by layer, with rows that are each at a position of its own.

    Attention depends on positions alone, not on where in the cache a token is.
    So all rows write a step's keys and values at one place, and a mask of
    positions tells which are whose. The cache is these positions, of shape
    `(batch, total)`, and for each layer its keys and values of shape `(batch,
    heads, total, head width)`: products read them as they are. KerasHub's
    layers (0.32) hold them as `(batch, 2, total, heads, head width)`, which
    every step slices, transposes and stacks again, most of its time on a CPU.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
        parts: The table of its layers' parts.
    """

    is_rowwise = True

    def __init__(self, causal_lm: Any, parts: Mapping[str, str]) -> None:
        super().__init__(causal_lm)
        self._parts = parts

    def empty(self, num_rows: int, total: int) -> Any:
        """A cache without tokens."""
        backbone = self.causal_lm.backbone
        shapes = [
            (part(layer, self._parts, role), layer.compute_dtype)
            for layer in backbone.transformer_layers
            for role in ("key", "value")
        ]
        places = ops.full((num_rows, total), _NOWHERE, "int32")
        caches = []
        for dense, dtype in shapes:
            *_, heads, width = dense.compute_output_shape(
                (1, 1, backbone.hidden_dim)
            )
            caches.append(ops.zeros((num_rows, heads, total, width), dtype))
        return (places, *caches)

    def first_positions(self, lengths: Any) -> Any:
        """Those of the last tokens, as logits are wanted of these alone."""
        return lengths - 1

    def prefill(self, token_ids: Any, lengths: Any, total: int) -> Any:
        """The cache after the prompts, but for their last tokens.

        Block by block: what is padding for all rows isn't computed, and no
        other length of prompts is compiled.
        """
        num_rows, time = token_ids.shape
        width = min(time, max(BLOCK, _TOKENS // num_rows))
        longest = ops.max(lengths) - 1
        last = ops.convert_to_tensor(time - width, "int32")

        def read(number: Any, cache: Any) -> tuple[Any, Any]:
            # The last block begins earlier, and reads some tokens again.
            start = ops.minimum(number * width, last)
            block = ops.slice(token_ids, (0, start), (num_rows, width))
            positions = start + ops.arange(width, dtype="int32")[None]
            _, cache = self._read(block, cache, positions, start)
            return number + 1, cache

        _, (places, *caches) = ops.while_loop(
            lambda number, _: number * width < longest,
            read,
            (ops.convert_to_tensor(0, "int32"), self.empty(num_rows, time)),
        )
        places = ops.where(places < lengths[:, None] - 1, places, _NOWHERE)
        new = (0, total - time)
        return (
            ops.pad(places, ((0, 0), new), constant_values=_NOWHERE),
            *(ops.pad(c, ((0, 0), (0, 0), new, (0, 0))) for c in caches),
        )

    def step(
        self, token_ids: Any, cache: Any, positions: Any, column: Any
    ) -> tuple[Any, Any]:
        """Logits of the tokens after those given."""
        hidden_states, cache = self._read(
            token_ids, cache, positions[:, None], column
        )
        backbone = self.causal_lm.backbone
        hidden_states = backbone.layer_norm(hidden_states)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        return logits[:, 0], cache

    def _read(
        self, token_ids: Any, cache: Any, positions: Any, column: Any
    ) -> tuple[Any, Any]:
        """Hidden states of tokens, which see each other and the cache.

        Args:
            token_ids: Integer tensor of shape `(batch, time)`.
            cache: What was read before.
            positions: Of the tokens, `(batch, time)` or `(1, time)`.
            column: The first of those that the cache has for them.

        Returns:
            Tensor of shape `(batch, time, width)`, and the next cache.
        """
        places, *caches = cache
        written = ops.broadcast_to(positions, token_ids.shape)
        places = ops.slice_update(places, (0, column), written)
        mask = self._sees(positions[..., None], places[:, None])
        angles = self._angles(positions)
        old, updated = iter(caches), list[Any]()

        def attend(layer: Any, hidden_states: Any) -> Any:
            query, *new = self._project(layer, hidden_states, angles)
            key, value = (
                backend.write(next(old), column, ops.swapaxes(part, 1, 2))
                for part in new
            )
            updated.extend((key, value))
            outputs = _attend_to_cache(query, key, value, mask)
            return self._part(layer, "output")(outputs)

        return self._layers(token_ids, attend), (places, *updated)

    def _sees(self, positions: Any, places: Any) -> Any:
        """Whether tokens attend to others, of which these are the positions."""
        mask = places <= positions
        window = getattr(self.causal_lm.backbone, "sliding_window", None)
        if window is not None:
            mask = ops.logical_and(mask, positions - places < window)
        return mask

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
        mask = ops.logical_and(
            mask, self._sees(positions[:, :, None], positions[:, None])
        )
        angles = self._angles(positions)

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

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines of rotary embeddings, the same for all layers.

        Args:
            positions: Integers of shape `(batch, time)`, or `(1, time)`.
        """
        backbone = self.causal_lm.backbone
        layer = backbone.transformer_layers[0]
        query = part(layer, self._parts, "query")
        width = query.compute_output_shape((1, 1, backbone.hidden_dim))[-1]
        inputs = ops.zeros((1, 1, 1, width))  # their shape is read
        angles: tuple[Any, Any] = self._part(layer, "angles")(
            inputs, positions=positions
        )
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

    def _part(self, layer: Any, role: str) -> Any:
        return direct(part(layer, self._parts, role))


def _attend_to_cache(query: Any, key: Any, value: Any, mask: Any) -> Any:
    """Attention in groups of heads.

    Args:
        query: Tensor of shape `(batch, time, heads, width)`.
        key: Tensor of shape `(batch, key heads, total, width)`.
        value: Tensor of that shape.
        mask: Boolean tensor of shape `(batch, time, total)`.

    Returns:
        Tensor of the shape of `query`.
    """
    batch_size, time, heads, width = query.shape
    key_heads, total = key.shape[1:3]
    grouped = (batch_size, key_heads, -1, width)
    query = ops.reshape(ops.swapaxes(query, 1, 2), grouped)
    scores = ops.matmul(query, ops.swapaxes(key, 2, 3))
    scores = ops.cast(scores, "float32") / np.sqrt(width)
    scores = ops.reshape(scores, (batch_size, heads, time, total))
    scores = ops.where(mask[:, None], scores, -np.inf)
    weights = ops.cast(ops.softmax(scores), value.dtype)
    weights = ops.reshape(weights, (batch_size, key_heads, -1, total))
    outputs = ops.matmul(weights, value)
    outputs = ops.reshape(outputs, (batch_size, heads, time, width))
    return ops.swapaxes(outputs, 1, 2)
