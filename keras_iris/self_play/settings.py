"""What decides how a run comes out, as strings and numbers."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_iris.callbacks import AlphaSchedule, AlphaScheduler
from keras_iris.data import Example
from keras_iris.generation import Engine
from keras_iris.models import SelfPlayModel

_PLAIN = bool | int | float | str | None


def model_settings(model: SelfPlayModel) -> dict[str, Any]:
    """Loss, optimizer, size and frozen weights of a compiled model."""
    frozen = [
        variable
        for variable in model.causal_lm.non_trainable_variables
        if variable.name != "seed_generator_state"
    ]
    return {
        **_named("loss", model.loss, model.start_config["loss"]),
        **_named("optimizer", model.optimizer, model.start_config["optimizer"]),
        "micro_batch_size": model.micro_batch_size,
        "parameters": model.causal_lm.count_params(),
        # Those that are trained are in the checkpoint.
        "frozen_weights": hash_variables(frozen) if frozen else "none",
        "dtype": model.dtype_policy.name,
        "backend": keras.backend.backend(),
    }


def part_settings(
    engine: Engine, callbacks: Sequence[keras.callbacks.Callback]
) -> dict[str, Any]:
    """Classes of engine and callbacks, and the arguments of our own."""
    settings = _named("engine", engine, engine.get_config())
    for i, callback in enumerate(callbacks):
        config = {}
        # Keras' own keep in such attributes what they learned in `fit`, too.
        if isinstance(callback, AlphaScheduler | AlphaSchedule):
            config = {
                name: _plain(value)
                for name, value in vars(callback).items()
                if not name.startswith("_") and name != "params"
            }
        settings |= _named(f"callback_{i}", callback, config)
    return settings


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


def hash_examples(examples: Sequence[Example]) -> str:
    """A hash of the examples' ids."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.response_ids):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(np.asarray(ids, "int32").tobytes())
    return digest.hexdigest()[:16]


def hash_variables(variables: Sequence[keras.Variable]) -> str:
    """A hash of the variables' values.

    Raises:
        FloatingPointError: A value isn't finite.
    """
    digest = hashlib.sha256()
    for variable in variables:
        value = keras.ops.convert_to_numpy(variable.value)
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f"The weight {variable.path} is not finite as the iteration "
                "starts. Load the model again, or lower the learning rate."
            )
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def _named(kind: str, part: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The class of a part, and its configuration, with the part's kind."""
    values = {
        f"{kind}.{name}": value
        if isinstance(value, _PLAIN)
        else json.dumps(value, default=str)
        for name, value in config.items()
        if name != "name"
    }
    return {kind: type(part).__name__, **values}
