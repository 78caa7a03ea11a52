"""What a decoder's config.json says, in one form for every architecture."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from keras_iris.data.rows import shorten
from keras_iris.hub.architecture_table import ARCHITECTURES, Architecture
from keras_iris.hub.checkpoint import EMBEDDING, HEAD
from keras_iris.hub.entries import (
    Rope,
    is_integer,
    read_entry,
    read_integer,
    read_ropes,
)

# Entries that change nothing of what a model computes, or only when others
# train it. What a file sets to null, false or nothing is harmless too.
_HARMLESS = frozenset(
    """
    _attn_implementation _model_name_or_path _name_or_path
    _sliding_window_pattern architectures
    attention_dropout auto_map bos_token_id cache_implementation
    chunk_size_feed_forward diversity_penalty dtype eos_token_id id2label
    initializer_range is_llama_config label2id layer_types length_penalty
    max_length max_position_embeddings max_window_layers model_type
    no_rope_layer_interval num_beam_groups num_beams num_return_sequences
    pad_token_id pretraining_tp repetition_penalty return_dict
    rope_local_base_freq rope_parameters rope_scaling rope_theta
    router_jitter_noise sliding_window sliding_window_pattern temperature
    top_k top_p torch_dtype transformers.js_config transformers_version
    typical_p unsloth_fixed unsloth_version use_cache
    """.split()
)


_NEUTRAL = {"partial_rotary_factor": 1.0}


def _size(entry: str, doc: str) -> Any:
    """A property: a number of things in config.json."""
    return property(lambda self: int(self.entries[entry]), doc=doc)


class Entry(NamedTuple):
    """A weight of a checkpoint.

    Attributes:
        name: Its name there.
        shape: Its shape there.
        layer: The number of its decoder layer, or `None`.
        role: What it is: a key of a table in `decoder_parts`, `"embedding"`,
            `"head"` or `"final_norm"`.
        expert: The number of its expert, or `None`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    role: str
    expert: int | None = None


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers that fix a decoder's weights and forward pass.

    Attributes:
        model_type: A key of the table of architectures.
        entries: Entries of config.json, those that the table names.
        ropes: Each layer's rotary embedding.
        windows: How many positions each layer looks back, itself included, or
            `None`.
        max_position_embeddings: The longest sequence that the model was made
            for, in tokens, if that is known.
        bos_token_id: The id of the start token, if that is known.
    """

    model_type: str
    entries: Mapping[str, Any]
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    max_position_embeddings: int | None = dataclasses.field(
        default=None, compare=False
    )
    bos_token_id: int | None = dataclasses.field(default=None, compare=False)

    vocabulary_size = _size("vocab_size", "Rows of the embedding.")
    num_layers = _size("num_hidden_layers", "Decoder layers.")
    hidden_size = _size("hidden_size", "The width of hidden states.")
    intermediate_size = _size("intermediate_size", "Of the feed-forward.")
    num_heads = _size("num_attention_heads", "Heads of queries.")
    num_key_value_heads = _size("num_key_value_heads", "Of keys and values.")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads the content of a Hugging Face config.json.

        Args:
            config: The content, with a `model_type` out of the table.

        Raises:
            ValueError: If an entry is missing, asks for something that
                KerasHub's model of this architecture doesn't compute, or is
                one that this function doesn't know.
        """
        model_type = config["model_type"]
        row = ARCHITECTURES[model_type]
        config = {row.aliases.get(name, name): v for name, v in config.items()}
        _check(model_type, row, config)
        merged = {**row.defaults, **config}
        heads = read_integer(merged, "num_attention_heads")
        merged["num_key_value_heads"] = merged["num_key_value_heads"] or heads
        usual = read_integer(merged, "hidden_size") // heads
        merged["head_dim"] = merged["head_dim"] or usual
        if "head_dim" not in row.arguments:
            _check_expected(model_type, "head_dim", merged["head_dim"], usual)
        windows = _read_windows(model_type, row, merged)
        if not any(windows):
            merged["sliding_window"] = None
        full, local = read_ropes(config, row.defaults, row.ropes)
        names = [*row.arguments, *row.adjusted]
        entries = {name: read_entry(merged, name) for name in names}
        length, start = "max_position_embeddings", config.get("bos_token_id")
        return cls(
            model_type=model_type,
            entries=entries,
            ropes=tuple(full if w is None else local for w in windows),
            windows=windows,
            max_position_embeddings=read_integer(config, length)
            if config.get(length)
            else None,
            bos_token_id=start if is_integer(start) else None,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads back."""
        row = self._row
        config = {
            "architectures": [row.class_name],
            "model_type": self.model_type,
            "head_dim": self.head_dim,
            "tie_word_embeddings": row.defaults["tie_word_embeddings"],
            **row.expected,
            **self.entries,
        }
        for name in ("max_position_embeddings", "bos_token_id"):
            if getattr(self, name) is not None:
                config[name] = getattr(self, name)
        full, local = self._ropes_by_kind()
        config |= full.to_json()
        if "rope_local_base_freq" in row.defaults:
            config["rope_local_base_freq"] = local.theta
        if row.windows == "layer":
            used = [window for window in self.windows if window is not None]
            if used:
                config["sliding_window"] = used[0]
            config["layer_types"] = [
                "full_attention" if window is None else "sliding_attention"
                for window in self.windows
            ]
        return config

    def _ropes_by_kind(self) -> tuple[Rope, Rope]:
        """Those of layers without and with a window, or the defaults."""
        defaults = self._row.defaults
        full = Rope(defaults["rope_theta"])
        local = Rope(defaults.get("rope_local_base_freq", 10000.0))
        for rope, window in zip(self.ropes, self.windows, strict=True):
            if window is None or "rope_local_base_freq" not in defaults:
                full = rope
            else:
                local = rope
        return full, local

    def weights(self) -> Iterator[Entry]:
        """The weights, in the order of a checkpoint."""
        row, hidden = self._row, self.hidden_size
        embedding = (self.vocabulary_size, hidden)
        yield Entry(EMBEDDING, embedding, None, "embedding")
        shapes = self._layer_shapes()
        for layer in range(self.num_layers):
            for role in self._roles(layer):
                name = f"model.layers.{layer}.{row.names[role]}"
                shape = shapes[role]
                if not role.startswith("expert"):
                    yield Entry(f"{name}.weight", shape, layer, role)
                    if role in row.biases:
                        yield Entry(f"{name}.bias", shape[:1], layer, role)
                    continue
                for expert in range(self._num_experts):
                    full = f"{name.format(expert)}.weight"
                    yield Entry(full, shape, layer, role, expert)
        yield Entry("model.norm.weight", (hidden,), None, "final_norm")
        if not self.tie_word_embeddings:
            yield Entry(HEAD, embedding, None, "head")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by their names in a checkpoint."""
        return {entry.name: entry.shape for entry in self.weights()}

    def _roles(self, layer: int) -> Iterator[str]:
        """The parts of a layer that have weights, in the table's order."""
        experts = self._num_experts
        is_sparse = (
            experts > 0
            and layer not in self.entries.get("mlp_only_layers", ())
            and (layer + 1) % self.entries.get("decoder_sparse_step", 1) == 0
        )
        for role in self._row.names:
            is_dense = role in ("gate", "up", "down")
            is_expert = role.startswith(("router", "expert_", "shared_"))
            is_left_out = is_dense if is_sparse else is_expert
            if role in self._row.parts and not is_left_out:
                yield role

    @property
    def router_scale(self) -> float:
        """KerasHub's coefficient of the routers' loss, as one of config.json.

        transformers counts every expert of a token and takes means over the
        layers; KerasHub takes shares of a token and adds up the layers. So
        the two agree for one layer, and in size for several.
        """
        layers = map(self._roles, range(self.num_layers))
        number = sum("router" in list(roles) for roles in layers)
        return int(self.entries["num_experts_per_tok"]) / max(1, number)

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        queries = self.num_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        expert = self.entries.get("moe_intermediate_size", inner)
        shared = self.entries.get("shared_expert_intermediate_size", 0)
        return {
            "attention_norm": (hidden,),
            "query": (queries, hidden),
            "key": (keys, hidden),
            "value": (keys, hidden),
            "output": (hidden, queries),
            "query_norm": (self.head_dim,),
            "key_norm": (self.head_dim,),
            "post_attention_norm": (hidden,),
            "feedforward_norm": (hidden,),
            "post_feedforward_norm": (hidden,),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            "router": (self._num_experts, hidden),
            "expert_gate": (expert, hidden),
            "expert_up": (expert, hidden),
            "expert_down": (hidden, expert),
            "shared_gate": (shared, hidden),
            "shared_up": (shared, hidden),
            "shared_down": (hidden, shared),
            "shared_router": (1, hidden),
        }

    @property
    def _row(self) -> Architecture:
        return ARCHITECTURES[self.model_type]

    @property
    def _num_experts(self) -> int:
        entries = self.entries
        number = entries.get("num_experts", entries.get("num_local_experts"))
        return int(number or 0)

    @property
    def inner_size(self) -> int:
        """The width of a feed-forward network, of all experts together."""
        usual = self.intermediate_size
        expert = int(self.entries.get("moe_intermediate_size", usual))
        return max(usual, self._num_experts * expert)

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        usual = self.hidden_size // self.num_heads
        return int(self.entries.get("head_dim", usual))

    @property
    def epsilon(self) -> float:
        """What norms add to a variance."""
        return float(self.entries["rms_norm_eps"])

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is also the output layer."""
        default = self._row.defaults["tie_word_embeddings"]
        return bool(self.entries.get("tie_word_embeddings", default))


def _check(
    model_type: str, row: Architecture, config: Mapping[str, Any]
) -> None:
    if config.get("quantization_config"):
        raise ValueError(
            "The checkpoint's weights are quantized. Expected float weights: "
            "load the original checkpoint, with `quantize='int8'` or 'int4' "
            "to quantize it here."
        )
    known = {*row.arguments, *row.adjusted, *row.defaults}
    for name, value in config.items():
        if value is None or _NEUTRAL.get(name) == value:
            continue
        if name in row.expected:
            _check_expected(model_type, name, value, row.expected[name])
        elif value and name not in known and name not in _HARMLESS:
            raise ValueError(
                f"config.json has {shorten(f'{name}={value!r}')}, an entry "
                f"that keras_iris doesn't know for a {model_type} model: it "
                "may change the logits. Remove it from the file if it "
                "doesn't, or use another checkpoint."
            )


def _check_expected(
    model_type: str, name: str, value: Any, expected: Any
) -> None:
    # Gemma's first files say "gelu" and mean the approximate one; those that
    # came later aren't read by this name.
    is_free = model_type == "gemma" or name == "hidden_act"
    if value == "gelu" and expected == "gelu_pytorch_tanh" and is_free:
        return
    if value != expected:
        raise ValueError(
            f"config.json has {name}={shorten(repr(value))}, expected "
            f"{expected!r}: "
            f"KerasHub 0.32's {model_type} model doesn't compute anything "
            "else, and its logits would be wrong. Use another checkpoint."
        )


def _read_windows(
    model_type: str, row: Architecture, merged: Mapping[str, Any]
) -> tuple[int | None, ...]:
    """Each layer's window."""
    num_layers = read_integer(merged, "num_hidden_layers")
    known = sliding, full = "sliding_attention", "full_attention"
    types = merged.get("layer_types") if row.reads_layer_types else None
    types = types or _usual_types(row, merged, num_layers)
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(kind not in known for kind in types)
        or (row.windows is None and sliding in types)
        or (row.windows == "argument" and len(set(types)) > 1)
    ):
        which = {None: f"{full!r} alone", "argument": "of one kind"}
        raise ValueError(
            f"config.json has layer_types={shorten(repr(types))}, expected "
            f"{num_layers} out of {known}, for a {model_type} model "
            f"{which.get(row.windows, 'of any kind')}. Use another checkpoint."
        )
    if not merged["sliding_window"]:
        return num_layers * (None,)
    size = read_integer(merged, "sliding_window")
    return tuple(size if kind == sliding else None for kind in types)


def _usual_types(
    row: Architecture, merged: Mapping[str, Any], num_layers: int
) -> list[str]:
    """The kinds of layers where a file doesn't say, as in transformers."""
    if row.windows != "layer":
        kind = "sliding_attention" if row.windows else "full_attention"
        return num_layers * [kind]
    name, pattern = "sliding_window_pattern", row.window_pattern
    if name in row.defaults:
        pattern = read_integer(merged, name)
    return [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(num_layers)
    ]
