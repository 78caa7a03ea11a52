"""What makes a run's result, and how it is carried out."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import keras
import numpy as np

from keras_iris import backend
from keras_iris.models.lora import find_lora
from keras_iris.models.values import hash_variables
from keras_iris.self_play.options import Options

_PLAIN = bool | int | float | str | None


@runtime_checkable
class Configured(Protocol):
    """Whatever tells with which arguments it was made, as Keras' parts do."""

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        ...


def result_settings(options: Options) -> dict[str, Any]:
    """What makes a run's result, but for data and weights."""
    model = options.model
    loss = {
        "class_name": type(model.loss).__name__,
        "config": model.loss_config,
    }
    names = "end_token_ids epochs batch_size num_samples max_response_length "
    names += "seed"
    is_told = isinstance(options.evaluate, Configured)
    parts = {
        "num_examples": len(options.examples),
        **{name: getattr(options, name) for name in names.split()},
        "loss": loss,
        "optimizer": model.optimizer,
        "model": model.causal_lm.backbone,
        "lora": find_lora(model.causal_lm.backbone),
        "parameters": model.causal_lm.count_params(),
        "callbacks": [
            c for c in options.callbacks if isinstance(c, Configured)
        ],
        # Scores of other examples can't be compared.
        **({"evaluate": options.evaluate} if is_told else {}),
        # The order changes between executions.
        "steps_per_execution": model.steps_per_execution,
        "backend": keras.backend.backend(),
    }
    return describe(parts)


def execution_settings(options: Options) -> dict[str, Any]:
    """What changes time and memory of a run, not what it computes."""
    names = "iterations shard_size max_prompt_length on_overflow on_bad_row "
    names += "keep_best checkpoint_every_minutes checkpoint_every_steps engine"
    return describe(
        {
            **{name: getattr(options, name) for name in names.split()},
            "micro_batch_size": options.model.micro_batch_size,
            "callbacks": [type(c).__name__ for c in options.callbacks],
            "device": ", ".join(sorted(set(backend.device_names()))),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        }
    )


def describe(value: Any, name: str = "") -> dict[str, Any]:
    """Classes and arguments in lines, `{"optimizer.momentum": 0.9}`.

    Args:
        value: A number, string, function or list, an object with `get_config`,
            or a dictionary of those; also what Keras makes of an object.
        name: How its lines begin.
    """
    value = _as_config(value)
    if not isinstance(value, Mapping):
        return {name: value}
    lines: dict[str, Any] = {}
    if "class_name" in value:
        lines[name] = value["class_name"]
        value = value["config"]
    if not isinstance(value, Mapping):  # the name of a function, from Keras
        return {name: value}
    for key, part in value.items():
        # Keras numbers names in a process; that of a dtype is all it has.
        if key != "name" or len(value) == 1:
            lines |= describe(part, f"{name}.{key}" if name else key)
    return lines


def _as_config(value: Any) -> Any:
    """Numbers, strings, lists of them, or a dictionary."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        is_plain = all(isinstance(part, _PLAIN) for part in value)
        parts = {str(i): part for i, part in enumerate(value)}
        return list(value) if is_plain else parts
    if isinstance(value, _PLAIN | Mapping):
        return value
    if isinstance(value, Configured) and not isinstance(value, type):
        config = value.get_config()
        return {"class_name": type(value).__name__, "config": config}
    # Of a function there is nothing more that another process has.
    return getattr(value, "__name__", type(value).__name__)


def versions() -> dict[str, str]:
    """The versions of what a run depends on."""
    packages = ["keras_iris", "keras", "keras-hub", "numpy"]
    names = [*packages, keras.backend.backend()]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # under another name
            found[name] = "unknown"
    return found


class WeightsHash:
    """The hash of a model's weights; those that aren't trained count once."""

    def __init__(self, causal_lm: keras.Model) -> None:
        self._trainable = causal_lm.trainable_variables
        self._frozen = hash_variables(
            variable
            for variable in causal_lm.non_trainable_variables
            if variable.name != "seed_generator_state"
        )

    def __call__(self) -> str:
        """The hash of the weights as they are."""
        return f"{hash_variables(self._trainable)}-{self._frozen}"
