"""Loading causal LMs with their tokenizers and chat templates."""

import warnings
from pathlib import Path
from typing import Any

import keras

from keras_iris import backend
from keras_iris.data import ChatTemplate
from keras_iris.data.text_files import read_json
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.architectures import make_causal_lm, read_config
from keras_iris.hub.checkpoint import find_weights, read_weights
from keras_iris.hub.inspect import read_checkpoint
from keras_iris.hub.keras_preset import load_keras_preset, load_untested
from keras_iris.hub.sources import find_folder, read_commit
from keras_iris.hub.weights import list_weights
from keras_iris.models.lora import Lora, Targets, add_lora
from keras_iris.models.remat import remat_layers

_QUANTIZATIONS = (None, "int8", "int4")


def load(  # noqa: PLR0913 (by keyword only)
    preset: str | Path,
    *,
    revision: str | None = None,
    dtype: Any = None,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_targets: Targets = ("query", "value"),
    quantize: str | None = None,
    remat: bool = False,
    default_template: ChatTemplate | None = None,
) -> keras.Model:
    """Loads a causal LM.

    Folders in Hugging Face's layout of an architecture in the table
    (docs/architectures.md) give the logits and token ids that transformers
    gives. Others pass through KerasHub; they are compared with transformers
    where that is installed.

    Args:
        preset: A KerasHub preset's name, `"hf://org/name"`,
            `"kaggle://..."`, or a folder in KerasHub's or Hugging Face's
            layout.
        revision: The branch, tag or commit of `"hf://org/name"`, the same as
            `"hf://org/name@revision"`.
        dtype: A Keras dtype policy or its name. Defaults to Keras' global
            one.
        lora_rank: Trains LoRA adapters of this rank and nothing else: a pair
            of matrices, in float32, for each adapted layer. Adapters start
            with the same values in every process, so that a run of self-play
            finds its own model again.
        lora_alpha: The adapters' outputs are multiplied by `lora_alpha /
            lora_rank`. Defaults to twice the rank.
        lora_targets: The layers that are adapted, out of `"query"`, `"key"`,
            `"value"`, `"output"`, `"gate"`, `"up"` and `"down"`, or `"all"`
            for every linear layer of the decoder blocks.
        quantize: `"int8"` or `"int4"`: quantizes the decoder layers'
            matrices, but no embeddings, before LoRA. int8 also rounds
            activations when it computes, so that an export is a slightly
            different model (SmolLM2-135M: 0.13 nats a token); int4 doesn't,
            and its export is the same model.
        remat: Whether the backward pass computes each layer's activations
            again instead of keeping them. On JAX on a CPU that saves memory
            only with `XLA_FLAGS` as in `keras_iris.models.remat`.
        default_template: Used where the checkpoint has no chat template: its
            end of turn becomes an end token, and `export` writes it.

    Returns:
        A KerasHub `CausalLM` without preprocessor, and with the attributes
        `tokenizer` (a `keras_iris.data.Tokenizer`), `chat_template` (a
        `keras_iris.data.ChatTemplate` or `None`), `source` (the folder, or
        `None`), `commit` (that of the Hugging Face repository, or `None`) and
        `max_position_embeddings` (tokens, or `None` if it isn't known).

    Raises:
        ValueError: If an argument is out of range, the preset isn't found or
            incomplete, or its parts don't fit each other.

    Examples:
        ```python
        causal_lm = keras_iris.load("path/to/folder", dtype="mixed_bfloat16")
        prompt = causal_lm.chat_template.render_prompt(messages)
        token_ids = causal_lm.tokenizer.encode(prompt)
        ```
    """
    lora = None
    if lora_rank is not None:
        lora = Lora(lora_rank, lora_alpha, lora_targets)
    elif lora_alpha is not None or tuple(lora_targets) != ("query", "value"):
        raise ValueError(
            "Without `lora_rank` there are no adapters, which `lora_alpha` and "
            "`lora_targets` are for. Pass `lora_rank=16`, or leave them out."
        )
    _check_quantize(quantize, lora)
    folder = find_folder(preset, revision)
    content = {} if folder is None else _read_config(folder)
    if folder is None or "model_type" not in content:
        causal_lm = load_keras_preset(
            str(folder or preset), dtype=dtype, template=default_template
        )
    elif str(content["model_type"]) in ARCHITECTURES:
        causal_lm = _load_tested(folder, content, dtype, default_template)
    else:
        causal_lm = load_untested(
            folder, content, dtype=dtype, default_template=default_template
        )
    causal_lm.source = folder
    causal_lm.commit = read_commit(folder)
    if quantize is not None:
        quantize_matrices(causal_lm, quantize)
    if lora is not None:
        add_lora(causal_lm.backbone, lora)
        _warn_of_adapters(causal_lm.backbone)
    if remat:
        remat_layers(causal_lm.backbone)
    return causal_lm


def _load_tested(
    folder: Path,
    content: dict[str, Any],
    dtype: Any,
    default_template: ChatTemplate | None,
) -> keras.Model:
    config, tokenizer, template = read_checkpoint(
        folder, content, default_template
    )
    files = find_weights(folder, config.weight_shapes())

    causal_lm = make_causal_lm(config, dtype=dtype)
    weights = {w.name: w for w in list_weights(causal_lm.backbone, config)}
    for name, array in read_weights(files):
        weights[name].assign(array)
    causal_lm.tokenizer = tokenizer
    causal_lm.chat_template = template
    causal_lm.max_position_embeddings = config.max_position_embeddings
    return causal_lm


def _read_config(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "config.json")
    adapter = read_json(folder / "adapter_config.json")
    apply = f"`keras_iris.hub.load_adapter(causal_lm, {str(folder)!r})`"
    if adapter and not content:
        raise ValueError(
            f"{folder} holds an adapter and no model. Expected a model's "
            f"folder: load {adapter.get('base_model_name_or_path')!r}, then "
            f"call {apply}."
        )
    if not content:
        raise ValueError(
            f"{folder} has no config.json. Expected a model's folder in "
            "Hugging Face's or KerasHub's layout."
        )
    if adapter:
        warnings.warn(
            f"{folder} holds an adapter beside the model, which isn't "
            f"applied: call {apply} to have it.",
            stacklevel=3,
        )
    return content


def _check_quantize(quantize: str | None, lora: Lora | None) -> None:
    if quantize not in _QUANTIZATIONS:
        raise ValueError(
            f"`quantize` has to be one of {_QUANTIZATIONS}. Received: "
            f"{quantize!r}"
        )
    if quantize is not None and lora is None:
        raise ValueError(
            f"A model quantized to {quantize} cannot be trained without "
            "LoRA. Pass `lora_rank=16`, or leave out `quantize`."
        )


def _warn_of_adapters(backbone: keras.Model) -> None:
    try:
        read_config(backbone)
    except ValueError:
        warnings.warn(
            f"The adapters of a {type(backbone).__name__} train, but neither "
            "`save_adapter` nor `export` can write them; `save_weights` can.",
            stacklevel=3,
        )


def quantize_matrices(causal_lm: keras.Model, mode: str) -> None:
    """Quantizes the decoder layers' matrices.

    Not the embeddings: the logits of Keras 3.15's quantized
    `ReversibleEmbedding` have no gradient but for one of its inputs.
    """
    matrices = (keras.layers.Dense, keras.layers.EinsumDense)

    def is_matrix(layer: keras.layers.Layer) -> bool:
        if not isinstance(layer, matrices):
            return False
        if backend.is_cut():
            # Keras (3.15) reads the matrix in NumPy, then deletes it.
            layer._kernel._value = backend.read(layer._kernel)
        return True

    with warnings.catch_warnings():
        # Keras 3.15 converts its variables to NumPy 2 in an old way.
        warnings.simplefilter("ignore", DeprecationWarning)
        causal_lm.quantize(mode, filters=is_matrix)
