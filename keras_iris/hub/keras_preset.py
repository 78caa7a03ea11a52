"""Presets that KerasHub loads itself."""

import json
from typing import Any

import keras
from safetensors import SafetensorError

from keras_iris.data import ChatTemplate, HubTokenizer, Tokenizer
from keras_iris.hub.architectures import adjust, find_config
from keras_iris.hub.fast_tokenizer import FastTokenizer
from keras_iris.hub.sentencepiece_definition import adapt_sentencepiece
from keras_iris.hub.tokenizer_folder import check_embeddings, template_end
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
# The published split expressions; they differ in how digits group.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
    r"\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_keras_preset(
    preset: str,
    *,
    dtype: Any = None,
    default_template: ChatTemplate | None = None,
) -> keras.Model:
    """Loads a causal LM through KerasHub.

    Args:
        preset: A name, URL or folder that KerasHub knows.
        dtype: A Keras dtype policy or its name.
        default_template: The chat template, as KerasHub's presets have none.

    Raises:
        ValueError: If KerasHub cannot load it, or its tokenizer doesn't fit.
    """
    from keras_hub import models

    try:
        causal_lm = models.CausalLM.from_preset(preset, dtype=dtype)
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
    hub = causal_lm.preprocessor.tokenizer
    tokenizer = _adapt(_with_template_end(HubTokenizer(hub), default_template))
    check_embeddings(tokenizer, causal_lm.backbone.vocabulary_size)
    # Its tokenizers are wrong in places, so nothing may use them by accident.
    causal_lm.preprocessor = None
    causal_lm.tokenizer = tokenizer
    causal_lm.chat_template = default_template
    return causal_lm


def _with_template_end(
    hub: HubTokenizer, template: ChatTemplate | None
) -> HubTokenizer:
    """The same tokenizer, with the template's end of turn as an end token."""
    to_id = hub.tokenizer.token_to_id
    ids = {token: int(to_id(token)) for token in hub.special_tokens}
    end_token_ids = [*template_end(template, ids), *hub.end_token_ids]
    return HubTokenizer(
        hub.tokenizer, end_token_ids=list(dict.fromkeys(end_token_ids))
    )


def _adapt(hub: HubTokenizer) -> Tokenizer:
    from keras_hub import tokenizers

    # KerasHub 0.32 hands the split expression of its byte-pair tokenizers to
    # `tokenizers` as a literal string, so that merges cross words.
    match hub.tokenizer:
        case tokenizers.Llama3Tokenizer():
            return _byte_level(hub, "{1,3}", None, ignore_merges=True)
        case tokenizers.QwenTokenizer():
            return _byte_level(hub, "", {"type": "NFC"}, ignore_merges=False)
        case tokenizers.MistralTokenizer() | tokenizers.GemmaTokenizer():
            return adapt_sentencepiece(hub)
    return hub


def _byte_level(
    hub: HubTokenizer,
    digits: str,
    normalizer: dict[str, str] | None,
    *,
    ignore_merges: bool,
) -> FastTokenizer:
    """A tokenizer.json made of KerasHub's vocabulary and merges."""
    vocabulary = dict(hub.tokenizer.vocabulary)
    added = [
        {
            "id": vocabulary.pop(token),
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in hub.special_tokens
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": _SPLIT.format(digits=digits)},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    definition = {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, to_bytes],
        },
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": list(hub.tokenizer.merges),
            "ignore_merges": ignore_merges,
        },
    }
    return FastTokenizer(
        json.dumps(definition),
        end_token_ids=hub.end_token_ids,
        pad_token_id=hub.pad_token_id,
    )
