"""KerasHub models of the architectures in the table."""

from collections.abc import Iterator
from typing import Any

import keras
from keras_hub import models

from keras_iris.backend.routers import silence_routers
from keras_iris.hub.architecture_table import ARCHITECTURES, Architecture
from keras_iris.hub.decoder_config import DecoderConfig
from keras_iris.hub.entries import Rope
from keras_iris.models.decoder_parts import part
from keras_iris.models.lora import lora_layers

# The arguments that tell apart what has one class in KerasHub.
_KINDS = (
    "use_post_ffw_norm",
    "use_post_attention_norm",
    "use_sliding_window_attention",
)
# Of KerasHub's rotary embedding, in the order of `Rope.llama3`.
_LLAMA3 = (
    "frequency_adjustment_factor",
    "low_freq_factor",
    "high_freq_factor",
    "pretraining_sequence_length",
)


class _WithoutAdapters:
    """A model that isn't saved as a KerasHub preset if it has adapters."""

    def save_to_preset(self, *args: Any, **kwargs: Any) -> None:
        """As KerasHub's, whose `from_preset` would drop adapters."""
        if lora_layers(self):
            raise ValueError(
                "A KerasHub preset can't hold LoRA's adapters. Use "
                "`keras_iris.export`, which merges them, or "
                "`keras_iris.hub.save_adapter`."
            )
        super().save_to_preset(*args, **kwargs)  # type: ignore[misc]


class _OfCheckpoint(_WithoutAdapters):
    """A KerasHub backbone whose config is the checkpoint's.

    KerasHub's own (0.32) knows nothing of what `adjust` does, and that of
    Llama leaves out whether embeddings are tied.
    """

    decoder_config: DecoderConfig

    def get_config(self) -> dict[str, Any]:
        """KerasHub's, and the checkpoint's."""
        content = self.decoder_config.to_json()
        return {**super().get_config(), "checkpoint": content}  # type: ignore

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> keras.Model:
        """The same backbone, with random weights."""
        content = DecoderConfig.from_json(config["checkpoint"])
        dtype = keras.dtype_policies.get(config["dtype"])
        return _make_backbone(content, dtype)


def _register(original: type, *bases: type, **attributes: Any) -> Any:
    made = type(original.__name__, (*bases, original), attributes)
    return keras.saving.register_keras_serializable("keras_iris")(made)


_BACKBONES = {
    name: _register(getattr(models, f"{name}Backbone"), _OfCheckpoint)
    for name in sorted({row.keras_hub for row in ARCHITECTURES.values()})
}
# By `backbone_cls` KerasHub finds the class for a preset with such a backbone.
_CAUSAL_LMS = {
    name: _register(
        getattr(models, f"{name}CausalLM"),
        _WithoutAdapters,
        backbone_cls=backbone,
    )
    for name, backbone in _BACKBONES.items()
}


def make_causal_lm(config: DecoderConfig, *, dtype: Any = None) -> keras.Model:
    """A KerasHub causal LM with random weights and no preprocessor.

    KerasHub's own converters aren't used: those of 0.32 drop or fix entries
    of config.json (epsilons, rotary scaling and bases, windows, the scale of
    queries), and round Mistral's weights to float16.
    """
    row = ARCHITECTURES[config.model_type]
    backbone = _make_backbone(config, dtype)
    return _CAUSAL_LMS[row.keras_hub](backbone=backbone, preprocessor=None)


def _make_backbone(config: DecoderConfig, dtype: Any) -> keras.Model:
    row = ARCHITECTURES[config.model_type]
    arguments = {
        argument: config.entries[entry]
        for entry, argument in row.arguments.items()
    }
    arguments["intermediate_dim"] *= row.halves
    if row.is_sparse:
        arguments[row.arguments["router_aux_loss_coef"]] *= config.router_scale
    if row.theta is not None:
        arguments[row.theta] = config.ropes[0].theta
    scaling = zip(_LLAMA3, config.ropes[0].llama3 or (), strict=False)
    arguments |= {**row.fixed, **{f"rope_{k}": v for k, v in scaling}}
    policy = keras.config.dtype_policy()
    try:
        # SmolLM3 (KerasHub 0.32) doesn't hand its dtype to its layers.
        keras.config.set_dtype_policy(dtype or policy)
        backbone = getattr(models, f"{row.keras_hub}Backbone")(
            **arguments, dtype=dtype
        )
    finally:
        keras.config.set_dtype_policy(policy)
    adjust(backbone, config)
    return backbone


def adjust(backbone: keras.Model, config: DecoderConfig) -> None:
    """Sets what KerasHub's backbones (0.32) have no arguments for.

    The epsilon of some norms, the base of some rotary embeddings, each
    layer's window, the scale of queries, and that routers have no loss
    unless the checkpoint trains with it.
    """
    for layer, name, value in _wanted(backbone, config):
        setattr(layer, name, value)
    backbone.__class__ = _BACKBONES[ARCHITECTURES[config.model_type].keras_hub]
    backbone.decoder_config = config
    if not config.entries.get("output_router_logits", True):
        silence_routers(backbone)


def _wanted(
    backbone: keras.Model, config: DecoderConfig
) -> Iterator[tuple[Any, str, Any]]:
    """Layers, names of attributes, and values that they ought to have."""
    row = ARCHITECTURES[config.model_type]
    final_norm = getattr(backbone, row.final_norm)
    yield final_norm, "epsilon", config.epsilon
    for layer, rope, window in zip(
        backbone.transformer_layers, config.ropes, config.windows, strict=True
    ):
        for role in row.parts:
            if role.endswith("_norm"):
                norm = part(layer, row.parts, role)
                yield norm, "epsilon", config.epsilon
        if "rope" in row.parts:
            embedding = part(layer, row.parts, "rope")
            yield embedding, "max_wavelength", rope.theta
            yield embedding, "scaling_factor", rope.factor
        attention = part(layer, row.parts, "attention")
        if row.windows == "layer":
            has_window = window is not None
            yield attention, "use_sliding_window_attention", has_window
            if has_window:
                yield attention, "sliding_window_size", window
        if "query_pre_attn_scalar" in row.adjusted:
            # Once the layer is built, that is read for its queries' scale.
            scalar = config.entries["query_pre_attn_scalar"]
            yield attention, "head_dim", scalar


def read_config(backbone: keras.Model) -> DecoderConfig:
    """What `make_causal_lm` would need to make this backbone.

    Raises:
        ValueError: If its architecture isn't in the table, or it uses
            something that a Hugging Face config.json cannot say.
    """
    if isinstance(backbone, _OfCheckpoint):
        return backbone.decoder_config
    config = find_config(backbone)
    if config is not None and all(
        getattr(layer, name) == value
        for layer, name, value in _wanted(backbone, config)
    ):
        return config
    raise ValueError(
        f"Cannot write a {type(backbone).__name__} with this configuration "
        f"as a Hugging Face folder. Expected a {', '.join(ARCHITECTURES)} "
        "model from `keras_iris.load`, or one of KerasHub that uses nothing "
        "else; for another architecture try KerasHub's "
        "`export_to_transformers`."
    )


def find_config(backbone: keras.Model) -> DecoderConfig | None:
    """The config that one of KerasHub's own backbones means.

    Its layers may not all be as the config says; `adjust` makes them. `None`
    for an architecture that isn't in the table.
    """
    for model_type, row in ARCHITECTURES.items():
        if type(backbone) is getattr(
            models, f"{row.keras_hub}Backbone"
        ) and all(
            getattr(backbone, name) == row.fixed[name]
            for name in _KINDS
            if name in row.fixed
        ):
            return _read(model_type, row, backbone)
    return None


def _read(
    model_type: str, row: Architecture, backbone: keras.Model
) -> DecoderConfig:
    entries = {
        entry: getattr(backbone, argument)
        for entry, argument in row.arguments.items()
    }
    entries["intermediate_size"] //= row.halves
    layers = backbone.transformer_layers
    attentions = [part(layer, row.parts, "attention") for layer in layers]
    if "query_pre_attn_scalar" in row.adjusted:
        entries["query_pre_attn_scalar"] = attentions[0].head_dim
    windows = [entries.get("sliding_window")] * len(layers)
    if row.windows == "layer":
        windows = [
            a.sliding_window_size if a.use_sliding_window_attention else None
            for a in attentions
        ]
    if row.is_sparse:
        entries["output_router_logits"] = True
    config = DecoderConfig(
        model_type=model_type,
        entries=entries,
        ropes=tuple(_read_rope(backbone, row, layer) for layer in layers),
        windows=tuple(windows),
    )
    if row.is_sparse:
        entries["router_aux_loss_coef"] /= config.router_scale
    return config


def _read_rope(backbone: keras.Model, row: Architecture, block: Any) -> Rope:
    if "rope" not in row.parts:
        return Rope(float(getattr(backbone, str(row.theta))))
    layer = part(block, row.parts, "rope")
    llama3: list[Any] = [getattr(layer, name, None) for name in _LLAMA3]
    return Rope(
        float(layer.max_wavelength),
        float(layer.scaling_factor),
        None if None in llama3 else tuple(map(float, llama3)),
    )
