"""Tiny runs of self-play, and what is left of them."""

import keras
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.callbacks import AlphaScheduler
from keras_iris.data import Example
from keras_iris.self_play.arrays import read_arrays
from keras_iris.self_play.checkpoints import Checkpoints

END = 1


def make_examples(number=24, seed=0, num_prompt_tokens=(4, 5)):
    """Of about one length, so that there is one shape to compile."""
    rng = np.random.default_rng(seed)

    def ids(low, high):
        size = rng.integers(low, high)
        return rng.integers(2, VOCABULARY_SIZE, size).astype("int32")

    return [
        Example(ids(*num_prompt_tokens), np.append(ids(4, 6), np.int32(END)))
        for _ in range(number)
    ]


def make_self_play(  # noqa: PLR0913
    run_dir,
    *,
    examples=None,
    learning_rate=0.01,
    lm_options=None,
    optimizer=None,
    compile_options=None,
    seed_of_weights=0,
    **options,
):
    model = keras_iris.SelfPlayModel(
        make_causal_lm(num_layers=1, seed=seed_of_weights, **(lm_options or {}))
    )
    model.compile(
        optimizer=optimizer or keras.optimizers.Adam(learning_rate),
        **{"loss": keras_iris.losses.IRIS(), **(compile_options or {})},
    )
    options = {
        "iterations": 2,
        "epochs": 2,
        "batch_size": 8,
        "max_response_length": 6,
        "shard_size": 10,
        "checkpoint_every_steps": 2,
        "callbacks": [AlphaScheduler()],
        "evaluate": lambda model: {"alpha": float(model.alpha.value)},
        **options,
    }
    return keras_iris.SelfPlay(
        model,
        make_examples() if examples is None else examples,
        run_dir,
        **options,
    )


def make_again(self_play, run_dir=None, **options):
    """Another run of the same model, by default in the same folder."""
    options = {
        "iterations": self_play.iterations,
        "epochs": self_play.epochs,
        "batch_size": 8,
        "max_response_length": 6,
        "shard_size": 10,
        "callbacks": [AlphaScheduler()],
        **options,
    }
    run_dir = run_dir or self_play.folder.path
    return keras_iris.SelfPlay(
        self_play.model, self_play.examples, run_dir, **options
    )


def begin(self_play):
    """Leaves a folder as a run that is cut off before its first step does."""

    def interrupt(model):
        raise KeyboardInterrupt

    self_play.evaluate = interrupt
    with pytest.raises(KeyboardInterrupt):
        self_play.run()


def lines_of(run_dir, kind):
    """What is in the metrics: `step`, `iteration` or `evaluation`."""
    lines = keras_iris.evaluation.read_metrics(run_dir)
    return [line for line in lines if line["kind"] == kind]


class Stop(keras.callbacks.Callback):
    """Asks to stop at the so-manieth batch of an epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == self.batch


class Interrupt(keras.callbacks.Callback):
    """Interrupts at the so-manieth batch of all, once."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupt_and_run_again(self_play):
    """As a notebook's cell that is run again."""
    with pytest.raises(KeyboardInterrupt):
        self_play.run()
    self_play.run()


def final_arrays(run_dir):
    return read_arrays(Checkpoints(run_dir).files()[0])[0]


def assert_same_end(left, right):
    ends = final_arrays(left), final_arrays(right)
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name], name)
