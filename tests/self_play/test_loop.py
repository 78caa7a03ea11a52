"""What a run does, and in which order."""

import csv
import json

import keras
import numpy as np
import pytest
from self_play_helpers import (
    Stop,
    assert_same_end,
    lines_of,
    make_again,
    make_examples,
    make_self_play,
)
from tiny_models import make_pairs

import keras_iris
from keras_iris.callbacks import AlphaScheduler, RenyiGap
from keras_iris.metrics import PairBatch
from keras_iris.self_play.arrays import read_arrays


def test_what_a_run_leaves(finished):
    steps = lines_of(finished, "step")
    assert [line["step"] for line in steps] == list(range(1, 13))
    evaluations = lines_of(finished, "evaluation")
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


def test_the_gap_is_that_of_all_pairs_before_the_first_step(finished):
    steps = lines_of(finished, "step")
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
    steps = [line["step"] for line in lines_of(tmp_path / "run", "step")]
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

        def on_run_end(self, logs=None):
            self.calls.append("end")

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
    calls = [
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
    assert Recorder.calls == [*calls, "end"]


def test_a_plain_fit_after_a_run_that_has_failed(tmp_path):
    """The scheduler streams the gap of the pairs that it sees."""

    class Fail(keras_iris.callbacks.SelfPlayCallback):
        def on_score_end(self, iteration, pairs, logs=None):
            raise KeyboardInterrupt

    scheduler = AlphaScheduler()
    self_play = make_self_play(tmp_path, callbacks=[scheduler, Fail()])
    with pytest.raises(KeyboardInterrupt):
        self_play.run()
    model = self_play.model
    assert keras.ops.convert_to_numpy(model.gap_sums)[0, 0] == 24
    model.fit(make_pairs(), np.zeros((8, 2)), verbose=0, callbacks=[scheduler])
    assert keras.ops.convert_to_numpy(model.gap_sums)[0, 0] == 8


def test_every_step_has_its_own_loss(tmp_path):
    class Recorder(keras.callbacks.Callback):
        losses = []

        def on_train_batch_end(self, batch, logs=None):
            # Keras logs the mean over the epoch so far.
            earlier = sum(self.losses[-batch:]) if batch else 0.0
            self.losses.append(logs["loss"] * (batch + 1) - earlier)

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
    logged = [line["loss"] for line in lines_of(tmp_path / "run", "step")]
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
        evaluate=lambda model: {"traces": len(traces)},
    )
    assert 1 < len(self_play.bucket_lengths) <= 5
    self_play.run()
    counts = [x["traces"] for x in lines_of(tmp_path / "run", "evaluation")]
    assert 0 < counts[1] == counts[2]


def test_evaluating_within_an_epoch_changes_no_line(finished, tmp_path):
    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 0:
                self.model.evaluate(
                    make_pairs(), np.full((8, 2), np.nan), verbose=0
                )

    make_self_play(
        tmp_path, iterations=1, callbacks=[Evaluate(), AlphaScheduler()]
    ).run()
    steps = lines_of(tmp_path, "step")
    expected = lines_of(finished, "step")[:6]
    for step, line in zip(steps, expected, strict=True):
        assert step | {"seconds": 0} == line | {"seconds": 0}


def test_a_new_run_has_nothing_of_the_models_last_but_weights(tmp_path):
    first = make_self_play(tmp_path / "a", iterations=1, epochs=1)
    first.run()
    new = make_self_play(tmp_path / "c", iterations=1, epochs=1)
    for old, variable in zip(
        first.model.trainable_variables,
        new.model.trainable_variables,
        strict=True,
    ):
        variable.assign(np.array(keras.ops.convert_to_numpy(old)))
    make_again(first, tmp_path / "b").run()
    new.run()
    assert_same_end(tmp_path / "b", tmp_path / "c")
