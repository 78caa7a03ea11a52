import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from self_play_helpers import (
    assert_same_end,
    final_arrays,
    make_self_play,
)

import keras_iris
from keras_iris.callbacks import AlphaScheduler
from keras_iris.self_play.arrays import read_arrays, write_arrays


def test_what_a_run_leaves(finished):
    lines = keras_iris.evaluation.read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["iteration"] for line in evaluations] == [0, 1, 2]
    # At the start of an iteration the policy is the opponent.
    for step in (0, 6):
        assert abs(steps[step]["margin"]) < 1e-4
    assert steps[5]["margin"] > 0.01
    for folder in ("synthetic", "opponent"):
        shards = sorted((finished / "iteration_002" / folder).iterdir())
        assert [s.name for s in shards] == [
            f"{i:05d}.safetensors" for i in range(3)
        ]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["settings"]["batch_size"] == 8


def test_synthetic_responses_differ_between_iterations(finished):
    name = "synthetic/00000.safetensors"
    first, _ = read_arrays(finished / "iteration_001" / name)
    second, _ = read_arrays(finished / "iteration_002" / name)
    assert first["token_ids"].tolist() != second["token_ids"].tolist()


def test_finished_run_is_left_as_it_is(finished):
    before = final_arrays(finished)
    make_self_play(finished).run()
    for name, array in final_arrays(finished).items():
        np.testing.assert_array_equal(array, before[name])


class _Killed(BaseException):
    pass


def _kill_at_write(monkeypatch, number):
    """Dies instead of the `number`-th write of a whole file."""
    count = 0

    def write(path, arrays, metadata):
        nonlocal count
        count += 1
        if count == number:
            (path.parent / f".{path.name}-1").write_bytes(b"half")
            raise _Killed
        write_arrays(path, arrays, metadata)

    monkeypatch.setattr("keras_iris.self_play.run_dir.write_arrays", write)


# Writes: 1 start; 2-4 synthetic; 5-7 opponent; 8 mid-epoch; 9 epoch; ...
@pytest.mark.parametrize(
    "write",
    [
        6,
        14,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 9, 20)),
    ],
)
def test_killed_at_a_write(write, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _kill_at_write(patch, write)
        with pytest.raises(_Killed):
            make_self_play(tmp_path / "run").run()
    make_self_play(tmp_path / "run").run()
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="elsewhere the seeds of dropout are variables, as weights are",
)
def test_killed_in_fit_with_dropout(tmp_path, monkeypatch):
    ends = tmp_path / "whole", tmp_path / "killed"
    options = dict(dropout=0.3, iterations=1, epochs=1)
    options["checkpoint_every_steps"] = 1
    make_self_play(ends[0], **options).run()
    killed = make_self_play(ends[1], **options)
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 9)
        with pytest.raises(_Killed):
            killed.run()
    _, metadata = read_arrays(ends[1] / "checkpoint.safetensors")
    assert json.loads(metadata["position"])["batch"] == 1
    # Random numbers that were drawn in between change nothing.
    keras.random.normal((7,))
    make_self_play(ends[1], **options).run()
    assert_same_end(*ends)


def test_kill_9_in_the_middle_of_fit(finished, tmp_path):
    """A real process, killed by the system after 9 steps."""
    run_dir = tmp_path / "run"
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import keras, self_play_helpers
from pathlib import Path
class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations.value) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
s = self_play_helpers.make_self_play(Path({str(run_dir)!r}))
s.callbacks.append(Kill())
s.run()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    (run_dir / ".checkpoint.safetensors-x.keras_iris-new").write_text("half")
    make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)
    assert not list(run_dir.rglob(".*"))


def test_corrupt_shard_is_made_again(finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 8)
        with pytest.raises(_Killed):
            make_self_play(run_dir).run()
    shard = run_dir / "iteration_001/opponent/00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="Making .* again"):
        make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def test_shard_lost_after_training_has_begun(finished, tmp_path):
    """The weights that made it are gone."""
    run_dir = tmp_path / "run"
    goes_on = [AlphaScheduler(), _Stop(99)]
    make_self_play(run_dir, callbacks=[AlphaScheduler(), _Stop(1)]).run()
    shard = run_dir / "iteration_001/opponent/00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.warns(UserWarning, match="Making .* again"):
        with pytest.raises(ValueError, match="lost.*Put the file back"):
            make_self_play(run_dir, callbacks=goes_on).run()
    shard.write_bytes(whole)
    make_self_play(run_dir, callbacks=goes_on).run()
    assert_same_end(run_dir, finished)


class _Stop(keras.callbacks.Callback):
    """Asks to stop at the so-manieth batch of an epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == self.batch


def test_the_same_model_goes_on_with_its_own_run(tmp_path):
    """A cell of a notebook that is run again."""
    self_play = make_self_play(tmp_path / "run", iterations=1, epochs=1)
    self_play.run()
    assert float(self_play.model.alpha.value) != 1.0
    keras_iris.SelfPlay(
        self_play.model,
        self_play.examples,
        tmp_path / "run",
        iterations=1,
        epochs=1,
        batch_size=8,
        max_response_length=6,
        shard_size=10,
        callbacks=[AlphaScheduler()],
    ).run()


def test_nan_weights_do_not_replace_the_checkpoint(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:  # the epoch's last
                variable = self.model.trainable_variables[0]
                variable.assign(np.full(variable.shape, np.nan, "float32"))

    run_dir = tmp_path / "run"
    self_play = make_self_play(run_dir, iterations=1, epochs=1)
    self_play.callbacks = [Break()]
    with pytest.raises(FloatingPointError, match="not finite.*is of before"):
        self_play.run()
    assert all(np.isfinite(a).all() for a in final_arrays(run_dir).values())


def test_epochs_count_on_and_every_step_has_its_own_loss(tmp_path):
    class Recorder(keras.callbacks.Callback):
        epochs, losses = [], []

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

        def on_train_batch_begin(self, batch, logs=None):
            self.losses.append(0.0)

        def on_train_batch_end(self, batch, logs=None):
            # Keras logs the mean over the epoch so far.
            earlier = sum(self.losses[-batch - 1 : -1])
            self.losses[-1] = logs["loss"] * (batch + 1) - earlier

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
    assert Recorder.epochs == [0, 1, 2, 3]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [
        line["loss"]
        for line in map(json.loads, lines)
        if line["kind"] == "step"
    ]
    np.testing.assert_allclose(logged, Recorder.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="which compiles nothing"
)
def test_later_iterations_compile_nothing(tmp_path, monkeypatch):
    traces = []
    call = keras_iris.SelfPlayModel.call

    def counted(self, inputs, training=None):
        traces.append(inputs["token_ids"].shape)
        return call(self, inputs, training=training)

    monkeypatch.setattr(keras_iris.SelfPlayModel, "call", counted)
    self_play = make_self_play(
        tmp_path / "run",
        iterations=3,
        evaluate=lambda model: {"traces": len(traces)},
    )
    assert len(self_play.bucket_lengths) <= 5
    self_play.run()
    lines = keras_iris.evaluation.read_metrics(tmp_path / "run")
    counts = [x["traces"] for x in lines if x["kind"] == "evaluation"]
    assert 0 < counts[1] == counts[2] == counts[3]


def test_checkpoint_by_time(tmp_path, monkeypatch):
    """With no time between them, the epoch's first step has one."""
    self_play = make_self_play(
        tmp_path / "run",
        checkpoint_every_steps=None,
        checkpoint_every_minutes=1e-9,
    )
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 9)
        with pytest.raises(_Killed):
            self_play.run()
    _, metadata = read_arrays(tmp_path / "run" / "checkpoint.safetensors")
    assert json.loads(metadata["position"])["batch"] == 1
