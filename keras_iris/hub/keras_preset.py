"""What KerasHub loads itself: its presets, and folders without a row."""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError

from keras_iris.data import ChatTemplate
from keras_iris.hub.architectures import adjust, find_config
from keras_iris.hub.checkpoint import find_weights
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
_TOKENS = np.arange(1, 9, dtype="int32")[None]
# Mean differences of log-probs, in nats. Wrong models are off by far more,
# rounding in half precision by less.
_TOLERANCES = {"float32": 1e-3}
_HALF_TOLERANCE = 0.25


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


def load_untested(
    folder: Path,
    content: Mapping[str, Any],
    *,
    dtype: Any,
    default_template: ChatTemplate | None,
) -> keras.Model:
    """Loads a Hugging Face folder of an architecture without a row.

    Raises:
        ValueError: As `load_keras_preset`, or if transformers, where it is
            installed with PyTorch, gives other log-probs for a few tokens.
    """
    find_weights(folder, {})  # for a look at the files
    template = ChatTemplate.from_folder(folder) or default_template
    causal_lm = load_keras_preset(
        str(folder), dtype=dtype, template=template, folder=folder
    )
    causal_lm.max_position_embeddings = content.get("max_position_embeddings")
    known = (
        "nothing was compared, which `pip install transformers torch` would "
        "change"
    )
    if all(map(importlib.util.find_spec, ("transformers", "torch"))):
        known = "a few tokens were compared with transformers"
        _compare(causal_lm, folder)
    warnings.warn(
        f"keras_iris has no tests for models of type "
        f"{content['model_type']!r}: {known}. It trains and generates in this "
        "process; `keras_iris.export` can't write it, so engines that need a "
        "folder can't answer with it.",
        stacklevel=3,
    )
    return causal_lm


def _compare(causal_lm: keras.Model, folder: Path) -> None:
    """Refuses a model that isn't the one of transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32"
    )
    model.eval().requires_grad_(False)
    # In place of PyTorch's own import, which only keras_iris.backend has.
    inputs = transformers.BatchEncoding(
        {"input_ids": _TOKENS.astype("int64")}, tensor_type="pt"
    )
    both = (
        causal_lm({"token_ids": _TOKENS, "padding_mask": _TOKENS > 0}),
        model(**inputs).logits.numpy(),
    )
    log_probs, expected = (
        ops.convert_to_numpy(ops.log_softmax(ops.cast(x, "float32")))
        for x in both
    )
    difference = float(np.abs(log_probs - expected).mean())
    tolerance = _TOLERANCES.get(causal_lm.compute_dtype, _HALF_TOLERANCE)
    if not difference <= tolerance:
        raise ValueError(
            f"KerasHub's {type(causal_lm).__name__} isn't the model in "
            f"{folder}: its log-probs are off by {difference:.2g} nats on "
            f"average from those of transformers, expected at most "
            f"{tolerance}. Use another checkpoint."
        )
