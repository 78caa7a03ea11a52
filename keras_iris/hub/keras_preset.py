"""Presets that KerasHub loads itself."""

from pathlib import Path
from typing import Any

import keras
from safetensors import SafetensorError

from keras_iris.data import ChatTemplate
from keras_iris.hub.architectures import adjust, find_config
from keras_iris.hub.convert_tokenizer import convert_keras_hub
from keras_iris.hub.tokenizer_folder import check_embeddings, load_tokenizer
from keras_iris.models.checks import check_causal_lm

# What KerasHub raises for folders that are damaged or of another kind.
_DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OSError,
    SafetensorError,
)


def load_keras_preset(
    preset: str,
    *,
    dtype: Any = None,
    template: ChatTemplate | None = None,
    folder: Path | None = None,
) -> keras.Model:
    """Loads a causal LM through KerasHub.

    Args:
        preset: A name, URL or folder that KerasHub knows.
        dtype: A Keras dtype policy or its name.
        template: The chat template, as KerasHub's presets have none.
        folder: Where the tokenizer is, if it is a Hugging Face folder.

    Raises:
        ValueError: If KerasHub cannot load it, or its tokenizer doesn't fit.
    """
    from keras_hub import models

    options: dict[str, Any] = {"dtype": dtype}
    if folder is not None:
        options["preprocessor"] = None
        tokenizer = load_tokenizer(folder, template)
    try:
        causal_lm = models.CausalLM.from_preset(preset, **options)
    except _DAMAGED as error:
        raise ValueError(
            f"KerasHub cannot load {preset!r}: {type(error).__name__}: "
            f"{error} Expected a causal language model of an architecture "
            "that it knows, with all its files."
        ) from error
    check_causal_lm(causal_lm)
    config = find_config(causal_lm.backbone)
    if config is not None:
        adjust(causal_lm.backbone, config)
    causal_lm.max_position_embeddings = None
    if folder is None:
        hub = causal_lm.preprocessor.tokenizer
        tokenizer = convert_keras_hub(hub, template)
    check_embeddings(tokenizer, causal_lm.backbone.vocabulary_size)
    # Its tokenizers are wrong in places, so nothing may use them by accident.
    causal_lm.preprocessor = None
    causal_lm.tokenizer = tokenizer
    causal_lm.chat_template = template and template.bind(tokenizer)
    return causal_lm
