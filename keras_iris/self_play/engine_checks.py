"""What an engine may be, and what it may answer."""

from typing import Any

import numpy as np

from keras_iris.generation import Completion, Engine
from keras_iris.generation.engine import check_prompts
from keras_iris.hub.adapter import check_adapter
from keras_iris.hub.export import check_export
from keras_iris.self_play.options import Options


def check_engine(engine: Any, options: Options) -> None:
    """Refuses what isn't an engine, or doesn't sample from the model.

    It has to sample from the model as it is, and to take the run's prompts,
    ends and lengths.
    """
    if not isinstance(engine, Engine):
        raise ValueError(
            "`engine` has to be an object of `KerasEngine`, `ServerEngine` or "
            "a subclass of one's own of `keras_iris.generation.Engine`. "
            f"Received: {engine!r}"
        )
    _check_writes(engine, options.model.causal_lm)
    # Keras (3.15) rounds the inputs of int8 layers, too, not those of int4. It
    # has no public way to all layers.
    lossy = {"trainer": (), "export": ("int8",), "adapter": ("int8", "int4")}
    for layer in options.model.causal_lm._flatten_layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode in lossy[engine.reads]:
            raise ValueError(
                f"{type(engine).__name__} reads each iteration's "
                f"{engine.reads} and computes in floats, the model that "
                f"trains in {mode}: their log-probs differ. Load the model "
                "with `quantize='int4'` and let the engine read exports, or "
                "without, or use `KerasEngine`."
            )
    config = engine.get_config()
    ends = config.get("end_token_ids", options.end_token_ids)
    if set(ends) != set(options.end_token_ids):
        raise ValueError(
            f"{type(engine).__name__} ends responses with {tuple(ends)}, the "
            f"data with {options.end_token_ids}. Give the engine the data's."
        )
    longest = options.max_response_length
    most = config.get("max_new_tokens", longest)
    if most > longest:
        raise ValueError(
            f"{type(engine).__name__} answers with up to {most} tokens, more "
            f"than max_response_length={longest}. Lower the one "
            "or raise the other."
        )
    temperature = config.get("temperature", 1.0)
    if temperature != 1:
        raise ValueError(
            "Self-play needs samples of the model itself, at temperature 1. "
            f"Received an engine with {temperature=}."
        )
    prompts = [example.prompt_ids.tolist() for example in options.examples]
    check_prompts(prompts, config.get("bucket_lengths", [None])[-1])


def _check_writes(engine: Engine, causal_lm: Any) -> None:
    """Refuses a model that can't be written for the engine."""
    check = {"export": check_export, "adapter": check_adapter}
    try:
        if engine.reads in check:
            check[engine.reads](causal_lm)
    except ValueError as error:
        raise ValueError(
            f"{type(engine).__name__} reads each iteration's {engine.reads}, "
            f"which this model doesn't have. {error}"
        ) from error


def check_completions(
    name: str,
    completions: Any,
    options: Options,
    *,
    num_prompts: int,
    first: int,
) -> None:
    """Refuses what an engine may not give back.

    Args:
        name: Of the engine.
        completions: What it gave.
        options: Of the run.
        num_prompts: How many it was to answer.
        first: Number of the first prompt.
    """
    if (
        not isinstance(completions, list | tuple)
        or len(completions) != num_prompts
        or not all(isinstance(c, Completion) for c in completions)
    ):
        raise ValueError(
            f"{name}.generate has to give a list with one `Completion` for "
            f"each of the {num_prompts} prompts. Received: "
            f"{str(completions)[:80]}"
        )
    for i, completion in enumerate(completions, first):
        fault = _find_fault(completion, options)
        if fault is not None:
            raise ValueError(f"Completion {i} of {name} {fault}")


def _find_fault(completion: Completion, options: Options) -> str | None:
    ids, given = completion.token_ids, completion.log_probs
    longest, ends = options.max_response_length, options.end_token_ids
    size = options.model.causal_lm.backbone.token_embedding.input_dim
    if len(ids) > longest:
        return (
            f"has {len(ids)} tokens, more than max_response_length={longest}. "
            "Give the engine that limit, or raise it."
        )
    if not ids or min(ids) < 0 or max(ids) >= size:
        return (
            f"has to be ids below {size}, the model's vocabulary. Received: "
            f"{ids}. Give the engine the model's own tokenizer and weights."
        )
    if set(ids[:-1]) & set(ends):
        return (
            f"goes on after an end token, one of {ends}. Received: {ids}. Cut "
            "it behind the first."
        )
    if given is not None and (
        np.shape(given) != (len(ids),) or not np.isfinite(given).all()
    ):
        return (
            f"has to have {len(ids)} finite log-probs, or None. Received: "
            f"{given}"
        )
    return None
