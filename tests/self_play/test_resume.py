"""A run that is cut off, stopped or damaged goes on where it was."""

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
    Interrupt,
    Stop,
    assert_same_end,
    final_arrays,
    interrupt_and_run_again,
    lines_of,
    make_examples,
    make_self_play,
)

from keras_iris.callbacks import AlphaScheduler
from keras_iris.self_play.arrays import read_arrays, write_arrays
from keras_iris.self_play.checkpoints import Checkpoints


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
    options = dict(lm_options={"dropout": 0.3}, iterations=1, epochs=1)
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


def test_two_samples_a_prompt(tmp_path):
    options = dict(num_samples=2, iterations=1, epochs=1)
    ends = tmp_path / "whole", tmp_path / "cut"
    whole = make_self_play(ends[0], **options)
    whole.run()
    steps = lines_of(ends[0], "step")
    assert len(steps) == whole.num_steps == 6  # 24 prompts, 8 pairs a step
    stopped = [AlphaScheduler(), Stop(2)]
    make_self_play(ends[1], callbacks=stopped, **options).run()
    assert len(lines_of(ends[1], "step")) == 3
    make_self_play(ends[1], **options).run()
    assert_same_end(*ends)
    with pytest.raises(ValueError, match="num_samples: 2 there, 1 here"):
        make_self_play(ends[0], iterations=1, epochs=1)

    # Both answers to a prompt are there, side by side, and not one twice.
    examples = make_examples()
    shards, scores = (
        [read_arrays(file)[0] for file in sorted(folder.iterdir())]
        for folder in (
            ends[0] / "iteration_001" / kind
            for kind in ("synthetic", "opponent")
        )
    )
    assert [len(shard["lengths"]) for shard in shards] == [10] * 4 + [8]
    lengths, ids, log_probs = (
        np.concatenate([arrays[name] for arrays in parts])
        for parts, name in (
            (shards, "lengths"),
            (shards, "token_ids"),
            (scores, "log_probs"),
        )
    )
    answers = np.split(ids, np.cumsum(lengths)[:-1])
    pairs = zip(answers[::2], answers[1::2], strict=True)
    assert sum(a.tolist() == b.tolist() for a, b in pairs) < 4
    np.testing.assert_allclose(log_probs[::2, 0], log_probs[1::2, 0], rtol=1e-5)
    # The gap is that of 24 annotated and 48 synthetic responses.
    real = log_probs[::2, 0] / [len(e.response_ids) for e in examples]
    samples = [s.astype("float64") for s in (real, log_probs[:, 1] / lengths)]
    means, variances = zip(
        *((s.mean(), s.var(ddof=1)) for s in samples), strict=True
    )
    noise = variances[0] / 24 + variances[1] / 48
    d2 = ((means[0] - means[1]) ** 2 - noise) / variances[1]
    gap = np.log1p(max(d2, 0.0))
    assert steps[0]["gap"] == pytest.approx(gap, rel=1e-4, abs=1e-6)


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


def test_nan_weights_do_not_replace_the_checkpoint(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:  # the epoch's last
                variable = self.model.trainable_variables[0]
                variable.assign(np.full(variable.shape, np.nan, "float32"))

    run_dir = tmp_path / "run"
    self_play = make_self_play(run_dir, iterations=1, epochs=1)
    self_play.callbacks = [Break()]
    with pytest.raises(FloatingPointError, match="not finite.*is older"):
        self_play.run()
    assert all(np.isfinite(a).all() for a in final_arrays(run_dir).values())


def test_a_stopped_run_that_is_extended(finished, tmp_path):
    """At an epoch's end; then the iterations that are left."""
    stopped = [AlphaScheduler(), Stop(2)]
    make_self_play(tmp_path, iterations=1, callbacks=stopped).run()
    position = read_arrays(tmp_path / "checkpoint.safetensors")[1]
    assert json.loads(position["position"])["epoch"] == 1
    make_self_play(tmp_path, iterations=1).run()
    make_self_play(tmp_path, iterations=2).run()
    assert_same_end(tmp_path, finished)
    with pytest.raises(ValueError, match="iterations: 2 there, 1 here; more"):
        make_self_play(tmp_path, iterations=1)


def test_what_does_not_change_the_result_may_change(finished, tmp_path):
    """Micro-batches and shards, in the middle of an iteration."""
    stopped = [AlphaScheduler(), Stop(1)]
    make_self_play(tmp_path, iterations=1, callbacks=stopped).run()
    options = {"compile_options": {"micro_batch_size": 2}, "shard_size": 7}
    make_self_play(tmp_path, iterations=1, **options).run()
    start = Checkpoints(finished).start(2)
    ends = final_arrays(tmp_path), read_arrays(start)[0]
    for name in ends[0]:
        np.testing.assert_allclose(
            ends[0][name], ends[1][name], rtol=1e-3, atol=1e-4
        )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["execution"]["shard_size"] == 7
    assert manifest["earlier"][0]["execution"]["shard_size"] == 10


def test_killed_between_fit_and_evaluation(finished, tmp_path):
    """What `fit` took is told of once."""
    values = iter([0.0, KeyboardInterrupt()])

    def evaluate(model):
        value = next(values)
        if isinstance(value, BaseException):
            raise value
        return {"alpha": value}

    with pytest.raises(KeyboardInterrupt):
        make_self_play(tmp_path, evaluate=evaluate).run()
    make_self_play(tmp_path).run()
    assert_same_end(tmp_path, finished)
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(text)["kind"] for text in texts]
    assert kinds.count("iteration") == 2
    assert all(x["fit_seconds"] > 0 for x in lines_of(tmp_path, "iteration"))


def test_going_back_to_a_start(tmp_path):
    """The checkpoint within the iteration is of other shards."""
    variable = keras.Variable(0.0)
    checkpoints = Checkpoints(tmp_path)

    def save(iteration, batch):
        position = {"iteration": iteration, "epoch": 0, "batch": batch}
        variable.assign(10.0 * iteration + batch)
        checkpoints.save([variable], position)
        return position

    positions = [save(1, 0), save(2, 0), save(2, 3)]
    assert checkpoints.load([variable]) == positions[2]
    assert checkpoints.load([variable], is_back=True) == positions[1]
    assert keras.ops.convert_to_numpy(variable) == 20.0
    assert checkpoints.load([variable]) == positions[1]
    _break(checkpoints.start(2))
    with pytest.warns(UserWarning, match="back to iteration 1, epoch 1"):
        assert checkpoints.load([variable], is_back=True) == positions[0]


def test_a_learning_rate_that_depends_on_the_last_one(tmp_path):
    """Keras begins the epoch twice, and asks the scheduler twice."""

    def make(folder, *callbacks):
        halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
        return make_self_play(tmp_path / folder, callbacks=[halve, *callbacks])

    make("whole").run()
    make("a", Stop(1)).run()
    make("a").run()
    assert_same_end(tmp_path / "a", tmp_path / "whole")


def test_again_with_an_optimizer_that_scales_losses(tmp_path):
    """In one process, where it is built already."""

    def make(folder, *callbacks):
        adam = keras.optimizers.Adam(0.01)
        return make_self_play(
            tmp_path / folder,
            optimizer=keras.optimizers.LossScaleOptimizer(adam, 8.0),
            callbacks=callbacks,
            iterations=1,
        )

    interrupt_and_run_again(make("a", Interrupt(2)))
    make("whole").run()
    assert_same_end(tmp_path / "a", tmp_path / "whole")
