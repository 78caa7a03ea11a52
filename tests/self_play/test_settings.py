import keras
import pytest
from self_play_helpers import END, begin, make_examples, make_self_play
from tiny_models import make_causal_lm

import keras_iris
from keras_iris.callbacks import AlphaSchedule, AlphaScheduler, RenyiGap
from keras_iris.generation import KerasEngine
from keras_iris.models.lora import Lora, add_lora


def test_other_settings_are_refused_line_by_line(finished):
    with pytest.raises(ValueError) as error:
        make_self_play(finished, batch_size=6, seed=1, learning_rate=0.5)
    assert "batch_size: 8 there, 6 here" in str(error.value)
    assert "seed: 0 there, 1 here" in str(error.value)
    assert "optimizer.learning_rate: 0.0" in str(error.value)


def test_other_arguments_of_the_scheduler_are_refused(finished):
    with pytest.raises(ValueError, match="max_alpha: 3.0 there, 1.0 here"):
        make_self_play(finished, callbacks=[AlphaScheduler(max_alpha=1.0)])


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (
            {"lm_options": {"rope_max_wavelength": 5000}},
            "model.rope_max_wavelength: 10000 there, 5000 here",
        ),
        (
            {"optimizer": keras.optimizers.Lion(0.01)},
            "optimizer: 'Adam' there, 'Lion' here",
        ),
    ],
)
def test_a_model_of_another_config(options, difference, finished):
    """The weights are the same."""
    with pytest.raises(ValueError, match=difference) as error:
        make_self_play(finished, **options)
    assert "weights: " not in str(error.value)


def test_what_changes_between_constructor_and_run(finished):
    self_play = make_self_play(finished)
    self_play.model.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match="rate: 0.0.* there, 0.5 here"):
        self_play.run()
    self_play.model.compile("adam", keras_iris.losses.IRIS(2.0))
    with pytest.raises(ValueError, match="loss.alpha: 1.0 there, 2.0 here"):
        self_play.run()
    self_play.model.compile("adam")
    with pytest.raises(ValueError, match="compiled with a loss"):
        self_play.run()


def test_each_of_several_schedulers_counts(tmp_path):
    begin(
        make_self_play(tmp_path, callbacks=[AlphaScheduler(), AlphaScheduler()])
    )
    with pytest.raises(ValueError, match="0.max_alpha: 3.0 there, 2.0 here"):
        make_self_play(
            tmp_path,
            callbacks=[AlphaScheduler(max_alpha=2.0), AlphaScheduler()],
        )


class _Gap(RenyiGap):
    def __init__(self, scale):
        self.scale = scale
        self.num_calls = float("nan")  # changes, and is no argument

    def get_config(self):
        return {"scale": self.scale}


def _decay(steps):
    return keras.optimizers.schedules.CosineDecay(2.0, steps)


@pytest.mark.parametrize(
    ("there", "same", "other", "message"),
    [
        (
            AlphaScheduler(gap=_Gap(1.0)),
            AlphaScheduler(gap=_Gap(1.0)),
            AlphaScheduler(gap=_Gap(2.0)),
            "gap.scale: 1.0 there, 2.0 here",
        ),
        (
            AlphaSchedule(_decay(10)),
            AlphaSchedule(_decay(10)),
            AlphaSchedule(_decay(20)),
            "schedule.decay_steps: 10 there, 20 here",
        ),
        (
            AlphaSchedule(lambda step: 1.0),
            AlphaSchedule(lambda step: 1.0),
            AlphaSchedule(_decay(10)),
            "schedule: '<lambda>' there, 'CosineDecay' here",
        ),
    ],
    ids=["gap", "schedule", "function"],
)
def test_parts_of_a_callback(there, same, other, message, tmp_path):
    begin(make_self_play(tmp_path, callbacks=there))
    make_self_play(tmp_path, callbacks=same)
    with pytest.raises(ValueError, match=message):
        make_self_play(tmp_path, callbacks=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.3},
            "samples of the model itself.* with temperature=0.3",
        ),
        (
            {"end_token_ids": (7,)},
            r"ends responses with \(7,\), the data with .1,",
        ),
        ({"max_new_tokens": 7}, "up to 7 tokens, more .*max_response_length=6"),
        ({"bucket_lengths": (2,)}, "prompts are too long: .* the limit is 2"),
    ],
)
def test_other_options_of_the_engine_are_refused(options, message, finished):
    options = {"end_token_ids": (END,), "max_new_tokens": 6, **options}
    engine = KerasEngine(make_causal_lm(num_layers=1), **options)
    with pytest.raises(ValueError, match=message):
        make_self_play(finished, engine=engine)


def test_another_batch_size_of_the_engine_is_taken(finished):
    engine = KerasEngine(
        make_causal_lm(num_layers=1),
        end_token_ids=(END,),
        max_new_tokens=6,
        batch_size=4,
    )
    make_self_play(finished, engine=engine)


def test_another_alpha_of_lora(tmp_path):
    """The starting weights are the same."""

    def make(alpha):
        lora = Lora(2, alpha, "all")
        causal_lm = make_causal_lm(num_layers=1)
        add_lora(causal_lm.backbone, lora)
        model = keras_iris.SelfPlayModel(causal_lm)
        model.compile("adam", keras_iris.losses.IRIS())
        return keras_iris.SelfPlay(
            model,
            make_examples(),
            tmp_path,
            batch_size=8,
            max_response_length=6,
        )

    begin(make(4.0))
    make(4.0)
    with pytest.raises(ValueError, match="lora.alpha: 4.0 there, 400.0 here"):
        make(400.0)
