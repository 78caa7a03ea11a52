import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from self_play_helpers import (
    Stop,
    assert_same_end,
    final_arrays,
    make_examples,
    make_self_play,
)

import keras_iris
from keras_iris.callbacks import AlphaScheduler, RenyiGap
from keras_iris.metrics import PairBatch
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
            half = path.parent / f".{path.name}-1.keras_iris-new"
            half.write_bytes(b"half")
            raise _Killed
        write_arrays(path, arrays, metadata)

    for module in ("run_dir", "checkpoints"):
        name = f"keras_iris.self_play.{module}.write_arrays"
        monkeypatch.setattr(name, write)


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
        if int(self.model.optimizer.iterations) == 9:
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
    with pytest.warns(UserWarning, match="It is made again"):
        make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def _break(file):
    file.write_bytes(file.read_bytes()[:-8])


def test_shard_lost_after_training_has_begun(finished, tmp_path):
    """The iteration starts again, from the weights that made it."""
    run_dir = tmp_path / "run"
    make_self_play(run_dir, callbacks=[AlphaScheduler(), Stop(1)]).run()
    shard = run_dir / "iteration_001/opponent/00001.safetensors"
    whole = shard.read_bytes()
    _break(shard)
    made, starts = (
        pytest.warns(UserWarning, match=match)
        for match in ("It is made again", "Iteration 1 starts again: .*00001")
    )
    with made, starts:
        make_self_play(run_dir).run()
    assert shard.read_bytes() == whole
    assert_same_end(run_dir, finished)


def test_scores_are_of_the_responses_that_are_there(tmp_path):
    """Where an engine answers otherwise when it is asked again."""
    run_dir = tmp_path / "run"
    make_self_play(run_dir, callbacks=[AlphaScheduler(), Stop(1)]).run()
    shard = run_dir / "iteration_001/synthetic/00001.safetensors"
    arrays, metadata = read_arrays(shard)
    arrays["token_ids"][0] = 2 if arrays["token_ids"][0] != 2 else 3
    write_arrays(shard, arrays, metadata)
    score = run_dir / "iteration_001/opponent/00001.safetensors"
    before = score.read_bytes()
    (run_dir / "checkpoint.safetensors").unlink()
    with pytest.warns(UserWarning, match="00001.* was made from other"):
        make_self_play(run_dir).run()
    assert score.read_bytes() != before


def test_a_new_run_has_nothing_of_the_models_last(tmp_path):
    self_play = make_self_play(tmp_path / "a", iterations=1)
    self_play.run()
    self_play.model.gap.assign(0.7)
    self_play.model.alpha.assign(1.35)
    keras_iris.SelfPlay(
        self_play.model,
        self_play.examples,
        tmp_path / "b",
        iterations=1,
        batch_size=8,
        max_response_length=6,
        callbacks=None,
    ).run()
    lines = keras_iris.evaluation.read_metrics(tmp_path / "b")
    steps = [line for line in lines if line["kind"] == "step"]
    assert {step["alpha"] for step in steps} == {1.0}
    assert {step["gap"] for step in steps} == {0.0}


def test_shard_lost_with_the_start(tmp_path):
    run_dir = tmp_path / "run"
    make_self_play(run_dir, callbacks=[AlphaScheduler(), Stop(1)]).run()
    (run_dir / "starts/iteration_001.safetensors").unlink()
    (run_dir / "iteration_001/opponent/00001.safetensors").unlink()
    with pytest.raises(ValueError, match="isn.t there.*Put the file back"):
        make_self_play(run_dir).run()


def test_damaged_checkpoint_goes_back_to_the_start(finished, tmp_path):
    run_dir = tmp_path / "run"
    make_self_play(run_dir, callbacks=[AlphaScheduler(), Stop(1)]).run()
    file = run_dir / "checkpoint.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # one bit
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged.*back to iteration 1, epoch"):
        make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def test_damaged_start_goes_back_to_the_one_before(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    starts = sorted((run_dir / "starts").iterdir())
    assert [s.stem for s in starts] == ["iteration_002", "iteration_003"]
    _break(starts[1])
    with pytest.warns(UserWarning, match="back to iteration 2, epoch 1"):
        make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def test_more_iterations_extend_a_finished_run(tmp_path):
    make_self_play(tmp_path / "a", iterations=3).run()
    make_self_play(tmp_path / "b", iterations=1).run()
    make_self_play(tmp_path / "b", iterations=3).run()
    assert_same_end(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="iterations: 3 there, 2 here; more"):
        make_self_play(tmp_path / "b", iterations=2)


def test_what_does_not_change_the_result_may_change(tmp_path):
    """Micro-batches and shards, in the middle of an iteration."""
    for name, options in (
        ("a", {}),
        ("b", {"compile_options": {"micro_batch_size": 2}, "shard_size": 7}),
    ):
        stop = [AlphaScheduler(), Stop(1)]
        make_self_play(tmp_path / name, iterations=1, callbacks=stop).run()
        make_self_play(tmp_path / name, iterations=1, **options).run()
    ends = [final_arrays(tmp_path / name) for name in "ab"]
    for name in ends[0]:
        np.testing.assert_allclose(
            ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4
        )
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    assert manifest["execution"]["shard_size"] == 7
    assert manifest["earlier"][0]["execution"]["shard_size"] == 10


def test_one_fit_an_iteration_for_callbacks_of_keras(tmp_path):
    class Recorder(keras.callbacks.Callback):
        fits, epochs = 0, []

        def on_train_begin(self, logs=None):
            Recorder.fits += 1

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

    log = tmp_path / "log.csv"
    make_self_play(
        tmp_path / "run",
        callbacks=[
            Recorder(),
            AlphaScheduler(),
            keras.callbacks.CSVLogger(log, append=True),
        ],
    ).run()
    assert Recorder.fits == 2
    assert Recorder.epochs == [0, 1, 2, 3]
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2", "3"]
    names = (
        "loss alpha gap margin margin_accuracy real_ess synthetic_ess "
        "real_log_ratio synthetic_log_ratio real_nll synthetic_nll"
    )
    for name in names.split():
        assert all(np.isfinite(float(row[name])) for row in rows), name


def test_early_stopping_ends_the_iteration(tmp_path):
    """A wait for two epochs of no better loss, as in one `fit`."""
    stop = keras.callbacks.EarlyStopping(
        "real_nll", patience=1, min_delta=1e6, mode="min"
    )
    options = dict(epochs=5, callbacks=[AlphaScheduler(), stop])
    make_self_play(tmp_path / "run", **options).run()
    lines = keras_iris.evaluation.read_metrics(tmp_path / "run")
    steps = [x["step"] for x in lines if x["kind"] == "step"]
    # The first epoch is the best, the second ends the iteration.
    assert steps == [*range(1, 7), *range(16, 22)]
    # Stopped in the first epoch and taken up again, it waits anew.
    stopped = [*options["callbacks"], Stop(1)]
    options["epochs"] = 2
    make_self_play(tmp_path / "b", **{**options, "callbacks": stopped}).run()
    make_self_play(tmp_path / "b", **options).run()


def test_self_play_callbacks(tmp_path):
    class Recorder(keras_iris.callbacks.SelfPlayCallback):
        calls = []

        def on_iteration_begin(self, iteration, logs=None):
            self.calls.append(("begin", iteration))

        def on_generate_end(self, iteration, responses, logs=None):
            assert len(responses) == 24
            assert logs["generated_tokens"] == sum(map(len, responses))
            self.calls.append(("generate", iteration))

        def on_score_end(self, iteration, pairs, logs=None):
            assert pairs.opponent.shape == pairs.num_tokens.shape == (24, 2)
            assert (pairs.opponent < 0).all()
            assert self.model.count_params() > 0
            self.calls.append(("score", iteration))

        def on_train_begin(self, logs=None):
            self.calls.append("fit")

        def on_iteration_end(self, iteration, logs=None):
            assert {"alpha", "fit_seconds"} <= logs.keys()
            self.calls.append(("end", iteration))

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
    assert Recorder.calls == [
        call
        for n in (1, 2)
        for call in (
            ("begin", n),
            ("generate", n),
            ("score", n),
            "fit",
            ("end", n),
        )
    ]


def test_the_gap_is_that_of_all_pairs_before_the_first_step(finished):
    lines = keras_iris.evaluation.read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "step"]
    for iteration, first in ((1, 0), (2, 6)):
        log_probs, num_tokens = _opponent(finished, iteration)
        gap = RenyiGap().gap(
            PairBatch(log_probs, log_probs, num_tokens, np.ones(24))
        )
        step = steps[first]
        assert step["gap"] == pytest.approx(gap, rel=1e-5, abs=1e-6)
        assert step["alpha"] == pytest.approx(1 + 0.5 * gap, rel=1e-5)
        assert {s["gap"] for s in steps[first : first + 6]} == {step["gap"]}


def _opponent(run_dir, iteration):
    """What is on disk of an iteration: log-probs and numbers of tokens."""
    folder = run_dir / f"iteration_{iteration:03d}"
    log_probs, lengths = (
        np.concatenate(
            [
                read_arrays(file)[0][name]
                for file in sorted((folder / kind).iterdir())
            ]
        )
        for kind, name in (("opponent", "log_probs"), ("synthetic", "lengths"))
    )
    real = [len(example.response_ids) for example in make_examples()]
    return log_probs.astype("float64"), np.stack([real, lengths], axis=1)


def test_the_same_model_goes_on_with_its_own_run(tmp_path):
    """A cell of a notebook that is run again."""
    self_play = make_self_play(tmp_path / "run", iterations=1, epochs=1)
    self_play.run()
    assert int(self_play.model.optimizer.iterations) > 0
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


def test_every_step_has_its_own_loss(tmp_path):
    class Recorder(keras.callbacks.Callback):
        losses = []

        def on_train_batch_end(self, batch, logs=None):
            # Keras logs the mean over the epoch so far.
            earlier = sum(self.losses[-batch:]) if batch else 0.0
            self.losses.append(logs["loss"] * (batch + 1) - earlier)

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
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
        examples=make_examples(num_prompt_tokens=(2, 20)),
        iterations=3,
        evaluate=lambda model: {"traces": len(traces)},
    )
    assert 1 < len(self_play.bucket_lengths) <= 5
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
