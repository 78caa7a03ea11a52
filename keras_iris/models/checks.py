"""What a `SelfPlayModel` refuses, and why."""

import numbers
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_iris.data.example import check_ids
from keras_iris.data.pairs import PairDataset

Tensor = Any

# A weight as they are, gradients from small to large, and a few steps.
_WEIGHT = 0.02
_GRADIENTS = (1e-3, 1e-2, 1e-1, 1.0)
_NUM_STEPS = 5


def check_optimizer(
    optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable]
) -> None:
    """Refuses an optimizer that can't move half-precision variables.

    Its own update is tried on a small variable of their type, at its largest
    learning rate: bfloat16 has 8 bits, which most steps are too small for,
    and moments whose decay rounds to 1 don't move at all.
    """
    for dtype in {v.dtype for v in variables} & {"bfloat16", "float16"}:
        rate = _largest_rate(optimizer)
        if not _moves(optimizer, rate, dtype):
            raise ValueError(
                f"{type(optimizer).__name__} at a learning rate of {rate:.3g} "
                f"moves no {dtype} variable of {_WEIGHT}: its steps are "
                f"rounded away. Load the model with dtype='mixed_{dtype}', "
                "which keeps variables in float32."
            )


def _largest_rate(optimizer: Any) -> float:
    """The largest learning rate of an optimizer's schedule."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _largest_rate(optimizer.inner_optimizer)
    schedule = optimizer.get_config()["learning_rate"]
    if isinstance(schedule, dict):
        schedule = keras.optimizers.schedules.deserialize(schedule)
    if not callable(schedule):
        return float(schedule)
    steps = [0, *np.geomspace(1, 1e6, 200).astype(int).tolist()]
    return max(float(schedule(step)) for step in steps)


def _moves(optimizer: Any, rate: float, dtype: str) -> bool:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    config = optimizer.get_config() | {"learning_rate": rate}
    config["gradient_accumulation_steps"] = None
    copy = type(optimizer).from_config(config)
    size = len(_GRADIENTS)
    variable = keras.Variable(np.full((size, size), _WEIGHT), dtype=dtype)
    gradient = np.repeat(_GRADIENTS, size).reshape(size, size)
    start = variable.numpy()
    for _ in range(_NUM_STEPS):
        copy.apply([keras.ops.cast(gradient, dtype)], [variable])
    return not np.array_equal(variable.numpy(), start)


def check_lora(model: keras.Model) -> None:
    """Refuses LoRA in Keras' way, whose rank counts for each head."""
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            raise ValueError(
                "Keras' `enable_lora` isn't taken: weight files don't hold "
                f"its factors. Received: a layer with it, {layer.path}. Use "
                "`keras_iris.load(..., lora_rank=16)`, or "
                "`keras_iris.models.add_lora`."
            )


def check_fit(model: Any, options: Mapping[str, Any]) -> None:
    """Refuses to train without a loss or variables, or with some weights.

    Args:
        model: A `SelfPlayModel`.
        options: Of `fit` or `train_on_batch`.
    """
    check_loss(model.loss)
    check_trainable(model)
    check_weights(options)
    class_weight = options.get("class_weight")
    if class_weight is not None:
        raise ValueError(
            "`class_weight` is not taken, as log-probs have no classes. "
            f"Received: {class_weight}. Weigh pairs by `sample_weight`."
        )


def check_weights(options: Mapping[str, Any]) -> None:
    """Refuses weights below 0, where they are given as arrays.

    Args:
        options: Of `fit`, `evaluate` or a method on a batch.
    """
    data = options.get("validation_data")
    given = [options.get("sample_weight")]
    given += data[2:] if isinstance(data, tuple | list) else []
    for weight in given:
        if keras.ops.is_tensor(weight):
            weight = keras.ops.convert_to_numpy(weight)
        if weight is not None and np.any(np.less(weight, 0)):
            raise ValueError(
                "`sample_weight` has to be 0 or above, as weights are "
                f"normalised to sum to 1. Received: {np.min(weight)} among "
                "them."
            )


def check_trainable(model: Any) -> None:
    """Refuses to train a model of which nothing is trainable."""
    if not model.trainable_variables:
        raise ValueError(
            "Nothing of the model is trainable. Expected at least one "
            "trainable variable: set `causal_lm.backbone.trainable = True`, "
            "or load the model with `lora_rank=16`."
        )


def check_input_ids(model: Any, x: Any) -> None:
    """Refuses token ids that the model doesn't have: on JAX they'd pass.

    Args:
        model: A `SelfPlayModel`.
        x: A `PairDataset`, or inputs as arrays; others aren't looked at.
    """
    size = model.causal_lm.backbone.token_embedding.input_dim
    if isinstance(x, PairDataset):
        x.check_vocabulary(size)
    elif isinstance(x, dict) and isinstance(x.get("token_ids"), np.ndarray):
        check_ids("`token_ids`", x["token_ids"], size)


def check_loss(loss: Any) -> None:
    """Refuses to compute one where there is none."""
    if loss is None:
        raise ValueError(
            "The model was compiled without a loss. Call `model.compile(loss="
            "keras_iris.losses.IRIS(), ...)` first."
        )


def check_causal_lm(causal_lm: Any) -> None:
    """Refuses a model that log-probs can't be made from."""
    # KerasHub's causal LMs are functional models: inputs -> backbone ->
    # token embedding in reverse. `operations` is in order of depth.
    operations = getattr(causal_lm, "operations", [])
    backbone = getattr(causal_lm, "backbone", None)
    head = getattr(backbone, "token_embedding", None)
    if (
        not isinstance(head, keras.layers.ReversibleEmbedding)
        or operations[-1] is not head
        or backbone not in operations
    ):
        raise ValueError(
            "`causal_lm` has to be a KerasHub `CausalLM` whose logits are its "
            "`backbone.token_embedding` applied in reverse to its backbone's "
            "output (Qwen, Mistral, Llama 3, Gemma, ...): log-probs are made "
            "from these parts. Received: "
            f"{type(causal_lm).__name__} with operations "
            f"{[operation.name for operation in operations]}. Pass the causal "
            "LM itself, not its backbone, or one of another architecture."
        )
    others = sorted({*causal_lm.input} - {"token_ids", "padding_mask"})
    if others:
        raise ValueError(
            "`causal_lm` has to take token ids and their mask, and nothing "
            f"else. Received: {type(causal_lm).__name__}, which also takes "
            f"{', '.join(others)}. Use a model of text only."
        )
    check_head(head)


def check_head(head: Any) -> None:
    """Refuses a quantized output layer, whose table isn't the embeddings."""
    if head.quantization_mode:
        raise ValueError(
            "The output layer of `causal_lm` has to be in float. Received: "
            f"{head.quantization_mode!r}. Use `keras_iris.load(..., "
            "quantize=...)`, which quantizes the decoder layers only."
        )


def check_length(causal_lm: Any, length: int | None) -> None:
    """Warns of sequences that are longer than the model was made for.

    Args:
        causal_lm: One from `keras_iris.load` knows how long they may be.
        length: Tokens of a sequence, padding included, if it is known.
    """
    longest = getattr(causal_lm, "max_position_embeddings", None)
    if length is not None and longest is not None and length > longest:
        warnings.warn(
            f"Sequences are padded to {length} tokens; the model's config.json "
            f"says max_position_embeddings={longest}. Beyond that its answers "
            "are arbitrary. Use shorter prompts, responses and buckets.",
            stacklevel=2,
        )


def check_compile(
    metrics: Any = None, jit_compile: Any = "auto", **_: Any
) -> None:
    """Refuses what Keras would refuse in the first step, or take for true.

    Args:
        metrics: Of `compile`, a name or a list with names.
        jit_compile: Of `compile`.
    """
    for metric in keras.tree.flatten(metrics):
        if isinstance(metric, str):
            keras.metrics.get(metric)  # raises for those that it doesn't know
    if jit_compile not in (True, False, "auto"):
        raise ValueError(
            "`jit_compile` has to be True, False or 'auto'. Received: "
            f"{jit_compile!r}"
        )


def check_micro_batch_size(size: Any) -> int | None:
    """The size as an integer."""
    if size is None:
        return None
    is_integer = isinstance(size, numbers.Integral)
    if not is_integer or isinstance(size, bool) or size < 1:
        raise ValueError(
            "`micro_batch_size` has to be an integer of at least 1, or None "
            f"for the whole batch. Received: {size!r}"
        )
    return int(size)


def check_inputs(inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of an input."""
    names = ("token_ids", "padding_mask", "response_mask")
    if not isinstance(inputs, dict) or any(n not in inputs for n in names):
        received = list(inputs) if isinstance(inputs, dict) else type(inputs)
        raise ValueError(
            f"Inputs have to be a dictionary of {', '.join(names)}. "
            f"Received: {received}"
        )
    shapes = {name: tuple(inputs[name].shape) for name in names}
    if any(len(shape) != 3 for shape in shapes.values()):
        raise ValueError(
            "Inputs have to be of shape (batch, 2, time), with (annotated, "
            f"synthetic) as the second axis. Received: {shapes}"
        )
    return inputs[names[0]], inputs[names[1]], inputs[names[2]]
