"""The control of a run: a plain loop of Keras is the oracle."""

import json

import keras
import numpy as np
import pytest
from self_play_helpers import make_examples, make_self_play
from tiny_models import make_causal_lm

import keras_iris
from keras_iris.data import PairDataset
from keras_iris.evaluation import HeldOut
from keras_iris.self_play.arrays import read_arrays, split_responses
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
