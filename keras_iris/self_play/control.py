"""The control of a run: the same steps from the same start, another loss."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris.generation import Completion, Engine
from keras_iris.generation.engine import Prompts
from keras_iris.losses import SelfPlayLoss
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.arrays import read_metadata, read_responses
from keras_iris.self_play.checkpoints import read_variables, write_variables
from keras_iris.self_play.options import Options, control_loss
from keras_iris.self_play.processes import from_first
from keras_iris.self_play.run_dir import (
    Manifest,
    RunDir,
    check_settings,
    read_manifest,
)
from keras_iris.self_play.seeds import combine_seeds
from keras_iris.self_play.settings import describe


class Control:
    """The second arm of a run, which the run's own model trains afterwards.

    Args:
        options: Of the run, with its model as it is before.
        folder: Of the run.
    """

    def __init__(self, options: Options, folder: RunDir) -> None:
        self.options = options
        self.folder = folder
        self.path = folder.path / "control"
        self.loss = control_loss(options.control)
        self._start = folder.path / "start.safetensors"
        rate = options.control_learning_rate
        self._optimizer = new_optimizer(options.model, rate)
        own = _read(folder.manifest)
        if rate is None and own is not None:
            # A run that was interrupted may have changed the model's.
            _set_rate(self._optimizer, own["settings"], "optimizer")

    @property
    def _old(self) -> Manifest | None:
        """The manifest of the control's folder, if it has begun."""
        return _read(self.path / "manifest.json")

    def check(self) -> None:
        """Refuses a folder with the control of another loss or rate.

        Raises:
            ValueError: With a line a difference.
        """
        old = self._old
        if old is None:
            return
        loss = {
            "class_name": type(self.loss).__name__,
            "config": self.loss.get_config(),
        }
        here = describe({"loss": loss, "optimizer": self._optimizer})
        here = json.loads(json.dumps(here))
        # A run may have changed its learning rate.
        here = {n: v for n, v in here.items() if n not in old.get("left", {})}
        there = {name: old["settings"].get(name) for name in here}
        check_settings(self.path, there, here)

    def keep_start(self, weights: str) -> None:
        """Keeps the weights that the run begins with, if they aren't yet.

        Args:
            weights: The hash of those that the model has.

        Raises:
            ValueError: They are others.
        """
        if from_first(self._has_start):
            return
        there = read_manifest(self.folder.manifest)["settings"]["weights"]
        if weights != there:
            raise ValueError(
                "The control needs the weights that the run began with, and "
                "this model has others. Load the model it began with, or pass "
                "another `run_dir`."
            )
        variables = self.options.model.trainable_variables
        write_variables(self._start, variables, {"weights": there})

    def _has_start(self) -> bool:
        """Whether the start is there; a damaged one is as good as none."""
        try:
            return self._start.exists() and bool(read_metadata(self._start))
        except ValueError as error:
            warnings.warn(f"{error}. It is written again.", stacklevel=2)
            return False

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Any]]:
        """While it lasts, the model is the control's at its start.

        Yields:
            The arguments of the control's `SelfPlay`, but model, data and
            folder.
        """
        model = self.options.model
        own = new_optimizer(model), model.loss
        loss_config = model.loss_config
        try:
            read_variables(self._start, model.trainable_variables)
            _recompile(model, self._optimizer, self.loss)
            yield self._arguments()
        finally:
            _recompile(model, *own)
            model.loss_config = loss_config
            with model.device_scope():
                model.optimizer.build(model.trainable_variables)

    def _arguments(self) -> dict[str, Any]:
        options = self.options
        left_out = ("model", "callbacks", "control", "control_learning_rate")
        arguments = {
            field.name: getattr(options, field.name)
            for field in dataclasses.fields(options)
            if field.init and field.name not in left_out
        }
        if not self.loss.uses_synthetic:
            # Which of them are a shard's is told by that.
            if (old := self._old) is not None:
                arguments["shard_size"] = old["execution"]["shard_size"]
            size = arguments["shard_size"]
            arguments["engine"] = Recorded(options, self.folder.path, size)
        title = f"Control of {options.title}: {type(self.loss).__name__}"
        return arguments | {"title": title}


def _read(file: Path) -> Manifest | None:
    """A manifest, if it's there."""
    return read_manifest(file) if from_first(file.exists) else None


def new_optimizer(
    model: SelfPlayModel, learning_rate: Any = None
) -> keras.optimizers.Optimizer:
    """One like a model's, of the same schedule unless told otherwise, unused.

    Raises:
        ValueError: A learning rate for an optimizer that wraps another.
    """
    optimizer = model.optimizer
    config = optimizer.get_config()
    if learning_rate is not None:
        if "learning_rate" not in config:
            raise ValueError(
                f"`control_learning_rate` isn't for {type(optimizer).__name__}"
                ", which has none of its own. Leave it out."
            )
        config["learning_rate"] = learning_rate
    with model.device_scope():
        new: keras.optimizers.Optimizer = type(optimizer).from_config(config)
    return new


def _set_rate(optimizer: Any, settings: dict[str, Any], name: str) -> None:
    """Gives an optimizer the learning rate of some settings, if it's a number.

    Args:
        optimizer: One, or one that wraps another.
        settings: Of a run, as `describe` gives them.
        name: How those of the optimizer begin.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        _set_rate(inner, settings, f"{name}.inner_optimizer")
    elif isinstance(settings.get(f"{name}.learning_rate"), int | float):
        optimizer.learning_rate = settings[f"{name}.learning_rate"]


def _recompile(
    model: SelfPlayModel,
    optimizer: keras.optimizers.Optimizer,
    loss: SelfPlayLoss,
) -> None:
    """Compiles a model with another optimizer and loss, else as it was."""
    with model.device_scope():
        model.compile(
            optimizer=optimizer,
            loss=loss,
            metrics=model.own_metrics,
            micro_batch_size=model.micro_batch_size,
            **model.compile_options,
        )


class Recorded(Engine):
    """Gives the responses that another run has drawn.

    A control that doesn't learn from them gets them all the same, as the
    order of the batches depends on how long they are.

    Args:
        options: Of both runs, but for the size.
        folder: Of the other one.
        size: Responses of a shard of this run.
    """

    def __init__(self, options: Options, folder: Path, size: int) -> None:
        self._folder = folder
        self._number = options.num_pairs
        self._ends = options.end_token_ids
        self._iteration = 0
        self._responses: list[np.ndarray] = []
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
            self._responses = read_responses(
                self._folder, iteration, self._number
            )
            self._iteration = iteration
        responses = self._responses
        return [
            Completion(
                tuple(ids.tolist()),
                "stop" if np.isin(ids[-1], self._ends) else "length",
            )
            for ids in responses[first : first + len(prompts)]
        ]
