"""The arguments of a run, and what can be wrong with them."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, InitVar, dataclass, field
from pathlib import Path
from typing import Any

import keras

from keras_iris import backend
from keras_iris.arguments import check_count, check_positive, check_shared
from keras_iris.data import ChatTemplate, Example, Tokenizer
from keras_iris.data.pairs import check_batch_size
from keras_iris.data.rows import OnBadRow
from keras_iris.data.tokenize import OnOverflow
from keras_iris.generation import Engine
from keras_iris.losses import SFT, SPACE, SPIF, SPIN, TSPIN, SelfPlayLoss
from keras_iris.metrics.score_mode import score_mode
from keras_iris.models import SelfPlayModel
from keras_iris.models.checks import check_trainable

Evaluate = Callable[[SelfPlayModel], dict[str, float]]
_LOSSES = (SFT, SPIN, SPACE, SPIF, TSPIN)
_NAMED = {loss.__name__.lower(): loss for loss in _LOSSES}


def control_loss(control: Any) -> SelfPlayLoss:
    """The loss that `SelfPlay(control=...)` names.

    Raises:
        ValueError: It is neither a loss nor the name of one.
    """
    if isinstance(control, SelfPlayLoss):
        return control
    if control not in _NAMED:
        raise ValueError(
            f"`control` has to be one of {sorted(_NAMED)}, a "
            f"`keras_iris.losses.SelfPlayLoss`, or None. Received: {control!r}"
        )
    loss: SelfPlayLoss = _NAMED[control]()
    return loss


@dataclass(eq=False, repr=False)
class Options:
    """The arguments of `SelfPlay`, and what it makes of its data."""

    model: SelfPlayModel
    data: InitVar[Any]
    run_dir: InitVar[str | Path]
    _: KW_ONLY
    iterations: int = 5
    epochs: int = 2
    batch_size: int = 64
    num_samples: int = 1
    max_prompt_length: int = 1024
    max_response_length: int = 256
    on_overflow: OnOverflow = "drop"
    on_bad_row: OnBadRow = "error"
    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    engine: Engine | None = None
    evaluate: Evaluate | None = None
    score_modes: Mapping[str, str] | None = None
    keep_best: str | None = None
    control: str | SelfPlayLoss | None = None
    control_learning_rate: Any = None
    callbacks: Any = ()
    shard_size: int = 512
    checkpoint_every_minutes: float = 10.0
    checkpoint_every_steps: int | None = None
    compilation_cache: str | Path | None = "~/.cache/keras_iris/xla"
    seed: int = 0
    title: str = "Self-play"
    examples: list[Example] = field(init=False)
    end_token_ids: tuple[int, ...] = field(init=False)
    bucket_lengths: tuple[int, ...] = field(init=False)

    @property
    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return len(self.examples) * self.num_samples

    def check(self) -> None:
        """Refuses arguments out of their range, whatever the model."""
        for name in (
            "iterations",
            "epochs",
            "batch_size",
            "num_samples",
            "max_prompt_length",
            "max_response_length",
            "shard_size",
        ):
            setattr(self, name, check_count(name, getattr(self, name)))
        check_batch_size(self.batch_size, self.num_samples)
        if self.checkpoint_every_steps is not None:
            check_count("checkpoint_every_steps", self.checkpoint_every_steps)
        check_positive(
            "checkpoint_every_minutes", self.checkpoint_every_minutes
        )
        self.seed = check_count("seed", self.seed, at_least=0)
        for name in [*(self.score_modes or ()), self.keep_best]:
            if name and score_mode(name, self.score_modes) is None:
                raise ValueError(
                    f"Whether a high or a low {name!r} is better isn't known. "
                    f'Pass score_modes={{"{name}": "max"}}, or "min".'
                )
        if self.control is not None:
            control_loss(self.control)
        if self.keep_best and self.evaluate is None:
            raise ValueError(
                f"keep_best={self.keep_best!r} needs `evaluate`, which has to "
                "give that score."
            )
        names = getattr(self.evaluate, "score_names", None)
        if self.keep_best and names and self.keep_best not in names:
            raise ValueError(
                f"keep_best={self.keep_best!r} isn't a score of `evaluate`. "
                f"Expected one of {list(names)}."
            )
        self.callbacks = keras.tree.flatten(self.callbacks or ())
        for callback in self.callbacks:
            _check_callback(callback)

    def check_model(self) -> None:
        """Refuses a model without a loss, or whose steps can't be logged."""
        model = self.model
        if not isinstance(model, SelfPlayModel):
            raise ValueError(
                "`model` has to be a `keras_iris.SelfPlayModel`, which is "
                f"made of a causal LM. Received: {type(model).__name__}"
            )
        if not model.compiled or model.loss is None:
            raise ValueError(
                "`model` has to be compiled with a loss before self-play. Call "
                "`model.compile(optimizer=..., "
                "loss=keras_iris.losses.IRIS())` first."
            )
        check_trainable(model)
        model.check_devices()
        check_shared("batch_size", self.batch_size, backend.num_batch_shares())
        steps = model.steps_per_execution
        if steps == "auto":
            raise ValueError(
                "`steps_per_execution` has to be a number for self-play, "
                "which logs every step. Received: 'auto'."
            )
        if self.batch_size * steps > model.recent.num_rows:
            raise ValueError(
                "Every step is logged, so batch_size * steps_per_execution may "
                f"be {model.recent.num_rows} pairs at most. Received: "
                f"{self.batch_size} * {steps}"
            )
        if model.train_function is None:
            model.make_train_function()  # Keras refuses what can't be
            model.train_function = None


def _check_callback(callback: Any) -> None:
    is_list = isinstance(callback, keras.callbacks.CallbackList)
    if is_list or not isinstance(callback, keras.callbacks.Callback):
        raise ValueError(
            "`callbacks` has to be a Keras callback or a list of them. "
            f"Received: {callback!r}"
        )
    is_swap = getattr(callback, "swap_on_epoch", False)
    if is_swap or isinstance(callback, keras.callbacks.BackupAndRestore):
        raise ValueError(
            f"`callbacks` has a {type(callback).__name__}, which exchanges "
            "weights behind the run's own checkpoints. Leave it out: `run` "
            "goes on by itself, and an optimizer's `use_ema` ends in averages."
        )
