"""A step is compiled for all lengths before its first call, and only once."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("of JAX only", allow_module_level=True)

import jax
from programs import environment
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.data import Example, PairDataset

LENGTHS = (8, 16, 24)
NUM_ROWS = 8


class Compilations(keras.callbacks.Callback):
    """Notes how often a step was compiled until each batch was done."""

    def __init__(self):
        super().__init__()
        self.number, self.after_batches = 0, []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event, duration, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            self.number += fun_name in ("jit(train_step)", "train_step")

    def on_train_batch_end(self, batch, logs=None):
        self.after_batches.append(self.number)


def make_dataset(shift=0):
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(2, VOCABULARY_SIZE, length).astype("int32")

    examples = [
        Example(ids(3), ids(length - 4))
        for length in LENGTHS
        for _ in range(NUM_ROWS)
    ]
    synthetic = [ids(len(example.response_ids)) for example in examples]
    return PairDataset(
        examples,
        synthetic,
        np.full((len(examples), 2), -9.0),
        batch_size=NUM_ROWS,
        bucket_lengths=[length + shift for length in (*LENGTHS, 32)],
        shuffle=False,
    )


def count():
    """Compilations until each batch of two epochs was done."""
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile("sgd", loss=keras_iris.losses.IRIS())
    counts = Compilations()
    model.fit(
        make_dataset(),
        epochs=2,
        callbacks=[counts],
        validation_data=make_dataset(shift=1),
        verbose=2,
    )
    return counts.after_batches


def test_all_lengths_are_compiled_before_the_first_step(capsys):
    assert make_dataset().sequence_lengths == set(LENGTHS)
    assert count() == [len(LENGTHS)] * 2 * len(LENGTHS)
    printed = capsys.readouterr().out
    assert printed.count("Compiling for sequences of 8 16 24 tokens") == 1


def test_so_they_are_for_several_devices():
    code = """
import json, keras, keras_iris
from backend.test_jax_programs import count
keras.distribution.set_distribution(
    keras_iris.distribution.make_distribution({"data": 2, "model": 4}, "2d")
)
print(json.dumps(count()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(8),
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [len(LENGTHS)] * 2 * len(LENGTHS)
