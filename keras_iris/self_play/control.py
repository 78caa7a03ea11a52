"""The control of a run: the same steps from the same start, another loss."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris.generation import Completion, Engine
from keras_iris.generation.engine import Prompts
from keras_iris.losses import SelfPlayLoss
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.arrays import read_arrays, split_responses
from keras_iris.self_play.options import Options
from keras_iris.self_play.seeds import combine_seeds


def recompile(
    model: SelfPlayModel,
    optimizer: keras.optimizers.Optimizer,
    loss: SelfPlayLoss,
    loss_config: dict[str, Any] | None = None,
) -> None:
    """Compiles a model with another optimizer and loss, else as it was.

    Args:
        model: A compiled one. What its old optimizer kept is given up.
        optimizer: The new one.
        loss: The new loss.
        loss_config: What the loss was once compiled with, where training has
            changed its order since.
    """
    model.compile(
        optimizer=optimizer,
        loss=loss,
        metrics=model.own_metrics,
        micro_batch_size=model.micro_batch_size,
        **model.compile_options,
    )
    if loss_config is not None:
        model.loss_config = loss_config


def new_optimizer(
    optimizer: keras.optimizers.Optimizer, learning_rate: Any = None
) -> keras.optimizers.Optimizer:
    """One like it, of the same schedule unless told otherwise, not used yet.

    Raises:
        ValueError: A learning rate for an optimizer that wraps another.
    """
    config = optimizer.get_config()
    if learning_rate is not None:
        if "learning_rate" not in config:
            raise ValueError(
                f"`control_learning_rate` isn't for {type(optimizer).__name__}"
                ", which has none of its own. Leave it out."
            )
        config["learning_rate"] = learning_rate
    new: keras.optimizers.Optimizer = type(optimizer).from_config(config)
    return new


class Recorded(Engine):
    """Gives the responses that another run has drawn.

    A control that doesn't learn from them gets them all the same, as the
    order of the batches depends on how long they are.

    Args:
        options: Of both runs.
        folder: Of the other one.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self._folder = folder
        self._ends = options.end_token_ids
        self._iteration = 0
        self._responses: list[np.ndarray] = []
        size = options.shard_size
        self._places = {
            combine_seeds(options.seed, iteration, number): (
                iteration,
                number * size,
            )
            for iteration in range(1, options.iterations + 1)
            for number in range(-(-options.num_pairs // size))
        }

    def generate(self, prompts: Prompts, *, seed: int) -> list[Completion]:
        """The responses of the shard that the seed belongs to."""
        iteration, first = self._places[seed]
        if iteration != self._iteration:
            name = f"iteration_{iteration:03d}/synthetic/*.safetensors"
            self._responses = [
                ids
                for file in sorted(self._folder.glob(name))
                for ids in split_responses(read_arrays(file)[0])
            ]
            self._iteration = iteration
        responses = self._responses
        return [
            Completion(
                tuple(ids.tolist()),
                "stop" if np.isin(ids[-1], self._ends) else "length",
            )
            for ids in responses[first : first + len(prompts)]
        ]


def control_options(
    options: Options, loss: SelfPlayLoss, folder: Path
) -> dict[str, Any]:
    """The arguments of the control's `SelfPlay`, but model, data and folder.

    Args:
        options: Of the run.
        loss: Of the control.
        folder: Of the run.
    """
    left_out = ("model", "callbacks", "control", "control_learning_rate")
    arguments = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.init and field.name not in left_out
    }
    if not loss.uses_synthetic:
        arguments["engine"] = Recorded(options, folder)
    title = f"Control of {options.title}: {type(loss).__name__}"
    return arguments | {"title": title}
