"""What makes a run's result, and how it is carried out."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.callbacks import AlphaSchedule, AlphaScheduler
from keras_iris.data import Example
from keras_iris.generation import Engine
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.arrays import hash_arrays

_PLAIN = bool | int | float | str | None


def objective_settings(
    model: SelfPlayModel, callbacks: Sequence[keras.callbacks.Callback]
) -> dict[str, Any]:
    """Loss, optimizer, size and schedule of the order of a compiled model."""
    settings = {
        **_named("loss", model.loss, model.start_config["loss"]),
        **_named("optimizer", model.optimizer, model.start_config["optimizer"]),
        "parameters": model.causal_lm.count_params(),
        "dtype": model.dtype_policy.name,
        # The order changes between executions.
        "steps_per_execution": model.steps_per_execution,
        "backend": keras.backend.backend(),
    }
    for callback in callbacks:
        if isinstance(callback, AlphaScheduler | AlphaSchedule):
            config = {
                name: _plain(value)
                for name, value in vars(callback).items()
                if not name.startswith("_") and name != "params"
            }
            settings |= _named("alpha", callback, config)
    return settings


def execution_settings(
    model: SelfPlayModel,
    engine: Engine,
    callbacks: Sequence[keras.callbacks.Callback],
) -> dict[str, Any]:
    """What changes time and memory of a run, not what it computes."""
    return {
        "micro_batch_size": model.micro_batch_size,
        **_named("engine", engine, engine.get_config()),
        "callbacks": [type(callback).__name__ for callback in callbacks],
        "device": ", ".join(sorted(set(backend.device_names()))),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
    }


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


def hash_examples(examples: Sequence[Example]) -> str:
    """A hash of the examples' ids."""
    ids = [
        np.asarray(part, "int32")
        for example in examples
        for part in (example.prompt_ids, example.response_ids)
    ]
    lengths = np.array([len(part) for part in ids], "int32")
    return hash_arrays({"ids": np.concatenate(ids), "lengths": lengths})[:16]


def hash_variables(variables: Iterable[keras.Variable]) -> str:
    """A hash of variables' values.

    Raises:
        FloatingPointError: A value isn't finite.
    """
    hashes = []
    for variable in variables:
        hashes.append(hash_arrays({"": finite(variable)}))
    letters = np.frombuffer("".join(hashes).encode(), np.uint8)
    return hash_arrays({"": letters})[:16]


def finite(variable: keras.Variable) -> np.ndarray:
    """The values of a variable, if training hasn't broken them.

    Raises:
        FloatingPointError: A value isn't finite.
    """
    value = keras.ops.convert_to_numpy(variable.value)
    if not np.isfinite(value).all():
        raise FloatingPointError(
            f"{variable.path} is not finite. What is on disk is of before. "
            "Load the model again if it is new; else lower the learning rate, "
            "clip gradients, or use a wider dtype."
        )
    return value


class WeightsHash:
    """The hash of a model's weights; those that aren't trained count once.

    Args:
        causal_lm: The model.
    """

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


def _plain(value: Any) -> Any:
    """A number or a string as it is, of others the class and arguments."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return keras.optimizers.schedules.serialize(value)
    # Those that are the same in another process; a function has none.
    arguments = getattr(value, "__dict__", {}).items()
    plain = {name: v for name, v in arguments if isinstance(v, _PLAIN)}
    return [type(value).__name__, plain]


def _named(kind: str, part: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The class of a part, and its configuration, with the part's kind."""
    values = {
        f"{kind}.{name}": value
        if isinstance(value, _PLAIN)
        else json.dumps(_unnamed(value), default=str)
        for name, value in config.items()
        if name != "name"
    }
    return {kind: type(part).__name__, **values}


def _unnamed(value: Any) -> Any:
    """A configuration without names, which Keras numbers in a process."""
    if isinstance(value, dict):
        return {k: _unnamed(v) for k, v in value.items() if k != "name"}
    if isinstance(value, list | tuple):
        return [_unnamed(item) for item in value]
    return value
