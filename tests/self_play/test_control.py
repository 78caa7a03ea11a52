"""The control of a run: a plain loop of Keras is the oracle."""

import json

import keras
import numpy as np
import pytest
from self_play_helpers import (
    Interrupt,
    assert_same_end,
    begin,
    interrupt_and_run_again,
    make_examples,
    make_self_play,
)
from tiny_models import make_causal_lm

import keras_iris
from keras_iris.callbacks import SelfPlayCallback
from keras_iris.data import PairDataset
from keras_iris.evaluation import HeldOut
from keras_iris.self_play.arrays import read_arrays, split_responses
from keras_iris.self_play.control import Recorded
from keras_iris.self_play.seeds import combine_seeds


def held_out():
    return HeldOut(make_examples(8, seed=5), batch_size=8, samples=0)


def weights_of(model):
    return [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]


def read_scores(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    return [x["nll_per_token"] for x in lines if x["kind"] == "evaluation"]


def train_by_hand(self_play):
    """SFT from the start, on the run's own pairs in its own order."""
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(
        optimizer=keras.optimizers.Adam(0.002), loss=keras_iris.losses.SFT()
    )
    examples, scores = self_play.examples, [held_out()(model)]
    for iteration in (1, 2):
        folder = self_play.folder.path / f"iteration_{iteration:03d}/synthetic"
        responses = [
            ids
            for file in sorted(folder.glob("*"))
            for ids in split_responses(read_arrays(file)[0])
        ]
        pairs = PairDataset(
            examples,
            responses,
            batch_size=8,
            bucket_lengths=self_play.bucket_lengths,
            seed=combine_seeds(self_play.seed, iteration),
        )
        model.fit(pairs, epochs=2, verbose=0)
        scores.append(held_out()(model))
    return model, [score["nll_per_token"] for score in scores]


def test_sft_from_the_same_start_in_the_same_steps(tmp_path):
    options = dict(evaluate=held_out(), control="sft")
    self_play = make_self_play(tmp_path, **options, control_learning_rate=0.002)
    self_play.run()
    plain = make_self_play(tmp_path / "plain", evaluate=held_out())
    plain.run()
    control, scores = train_by_hand(self_play)
    found = read_scores(tmp_path / "control")
    np.testing.assert_allclose(found, scores, rtol=1e-5)
    assert read_scores(tmp_path)[0] == found[0]
    # The model is as if there had been no control.
    for here, there in zip(
        weights_of(self_play.model), weights_of(plain.model), strict=True
    ):
        np.testing.assert_array_equal(here, there)
    assert isinstance(self_play.model.loss, keras_iris.losses.IRIS)
    table = keras_iris.evaluation.scores_table(tmp_path)
    assert "control" in table and "no run to compare" not in table


def test_a_control_is_taken_up_again(tmp_path):
    whole = make_self_play(
        tmp_path / "whole", evaluate=held_out(), control="sft"
    )
    whole.run()
    scores = held_out()
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 5:  # after the first iteration of the control
            raise KeyboardInterrupt
        return scores(model)

    broken = make_self_play(tmp_path / "a", evaluate=evaluate, control="sft")
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    for here, there in zip(
        weights_of(broken.model), weights_of(whole.model), strict=True
    ):
        np.testing.assert_array_equal(here, there)
    again = make_self_play(tmp_path / "a", evaluate=scores, control="sft")
    again.run()
    assert (
        read_scores(tmp_path / "a" / "control")[-1:]
        == read_scores(tmp_path / "whole" / "control")[-1:]
    )


def test_another_loss_draws_its_own_responses(tmp_path):
    self_play = make_self_play(
        tmp_path, evaluate=held_out(), control="spin", iterations=2
    )
    self_play.run()
    shard = "iteration_002/synthetic/00000.safetensors"
    own, control = (
        read_arrays(folder / shard)[0]["token_ids"]
        for folder in (tmp_path, tmp_path / "control")
    )
    assert own.tolist() != control.tolist()


def test_another_control_is_refused_before_the_run_trains(tmp_path):
    options = dict(evaluate=held_out(), epochs=1, control="sft")
    make_self_play(tmp_path, iterations=1, **options).run()
    before = (tmp_path / "metrics.jsonl").read_text()
    for others, line in (
        ({"control": "spin"}, "loss: 'SFT' there, 'SPIN' here"),
        (
            {"control_learning_rate": 0.002},
            "optimizer.learning_rate: 0.0099.* there, 0.0020.* here",
        ),
    ):
        with pytest.raises(ValueError, match=f"control holds .*\n.*{line}"):
            make_self_play(tmp_path, **{**options, **others})
    assert (tmp_path / "metrics.jsonl").read_text() == before
    make_self_play(tmp_path, iterations=2, **options).run()
    assert len(read_scores(tmp_path / "control")) == 3


def test_controls_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="'sft'.*Received: 'dpo'"):
        make_self_play(tmp_path, control="dpo")
    make_self_play(tmp_path, iterations=1).run()
    other = make_self_play(tmp_path, control="sft", seed_of_weights=0)
    other.model.trainable_variables[0].assign_add(
        np.ones(other.model.trainable_variables[0].shape)
    )
    with pytest.raises(ValueError, match="weights"):
        other.run()


@pytest.mark.parametrize("shard_size", [7, 100])
def test_a_control_is_taken_up_with_another_shard_size(
    tmp_path, monkeypatch, shard_size
):
    options = dict(evaluate=held_out(), control="sft", epochs=1)
    make_self_play(tmp_path / "whole", **options).run()
    generate, calls = Recorded.generate, []

    def stop(self, prompts, *, seed):
        calls.append(seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, prompts, seed=seed)

    monkeypatch.setattr(Recorded, "generate", stop)
    with pytest.raises(KeyboardInterrupt):
        make_self_play(tmp_path / "a", **options).run()
    make_self_play(tmp_path / "a", **options, shard_size=shard_size).run()
    shards = "control/iteration_001/synthetic/*"
    for there in sorted((tmp_path / "whole").glob(shards)):
        here = tmp_path / "a" / there.relative_to(tmp_path / "whole")
        for name, array in read_arrays(there)[0].items():
            np.testing.assert_array_equal(read_arrays(here)[0][name], array)
    assert_same_end(tmp_path / "a/control", tmp_path / "whole/control")


def test_responses_that_are_gone_when_the_control_begins(tmp_path):
    options = dict(evaluate=held_out(), control="sft", epochs=1)
    shard = tmp_path / "a/iteration_001/synthetic/00001.safetensors"

    class Lose(SelfPlayCallback):
        def on_run_end(self, logs=None):
            shard.rename(tmp_path / "kept")

    with pytest.raises(ValueError, match="14 responses, expected 24.*Put the"):
        make_self_play(tmp_path / "a", **options, callbacks=[Lose()]).run()
    (tmp_path / "kept").rename(shard)
    make_self_play(tmp_path / "a", **options, callbacks=[]).run()
    make_self_play(tmp_path / "whole", **options, callbacks=[]).run()
    assert_same_end(tmp_path / "a/control", tmp_path / "whole/control")


def test_a_damaged_start_is_written_again(tmp_path):
    options = dict(evaluate=held_out(), control="sft", epochs=1)
    begin(make_self_play(tmp_path / "a", **{**options, "evaluate": None}))
    (tmp_path / "a/start.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="start.* It is written again"):
        make_self_play(tmp_path / "a", **options).run()
    make_self_play(tmp_path / "whole", **options).run()
    assert_same_end(tmp_path / "a/control", tmp_path / "whole/control")


def test_the_rate_is_that_of_the_run_as_it_began(tmp_path):
    """Not what it has become in the model that an interrupt has left."""

    def make(folder, *callbacks):
        decay = keras.callbacks.LearningRateScheduler(
            lambda epoch: 0.01 if epoch < 1 else 1e-4
        )
        return make_self_play(
            tmp_path / folder,
            evaluate=held_out(),
            control="sft",
            iterations=1,
            callbacks=[decay, *callbacks],
        )

    interrupt_and_run_again(make("a", Interrupt(5)))
    make("whole").run()
    assert_same_end(tmp_path / "a/control", tmp_path / "whole/control")
