"""Options of Keras' training, through whole runs that are cut off."""

import keras
import numpy as np
import pytest
from self_play_helpers import (
    Stop,
    assert_same_end,
    lines_of,
    make_self_play,
)

from keras_iris.callbacks import AlphaSchedule, AlphaScheduler


def _adam(**options):
    return keras.optimizers.Adam(0.01, **options)


def _cosine():
    return keras.optimizers.schedules.CosineDecay(0.01, 12)


OPTIONS = {
    "accumulation": lambda: {
        "optimizer": _adam(
            gradient_accumulation_steps=4, use_ema=True, ema_momentum=0.5
        )
    },
    "steps per execution": lambda: {
        "compile_options": {"steps_per_execution": 2}
    },
    "scaling and schedules": lambda: {
        "optimizer": keras.optimizers.LossScaleOptimizer(
            keras.optimizers.Adam(_cosine())
        ),
        "callbacks": [AlphaSchedule(_cosine())],
    },
    "plateau": lambda: {
        "callbacks": [
            keras.callbacks.ReduceLROnPlateau(
                "real_nll", patience=0, min_delta=1e6, cooldown=0, mode="min"
            )
        ],
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_is_cut_off_ends_the_same(name, tmp_path):
    if name == "steps per execution" and keras.backend.backend() == "torch":
        pytest.skip("which has one step an execution")

    def make(run_dir, *more):
        options = {"callbacks": [AlphaScheduler()], **OPTIONS[name]()}
        options["callbacks"] = [*options["callbacks"], *more]
        return make_self_play(tmp_path / run_dir, **options)

    whole = make("whole")
    whole.run()
    # In the middle of an epoch, with steps of 2 after the first execution.
    make("cut", Stop(1)).run()
    resumed = make("cut")
    resumed.run()
    if name != "plateau":  # whose patience starts anew
        assert_same_end(tmp_path / "whole", tmp_path / "cut")
    for run_dir in ("whole", "cut"):
        steps = [line["step"] for line in lines_of(tmp_path / run_dir, "step")]
        assert steps == list(range(1, 13))
    if name == "accumulation":
        assert int(whole.model.optimizer.iterations) == 3
    if name == "plateau":
        assert float(whole.model.optimizer.learning_rate) < 0.01


def test_averages_take_the_weights_place_at_an_iterations_end(tmp_path):
    """As at the end of any `fit`; not at the end of each epoch."""

    class Recorder(keras.callbacks.Callback):
        starts, ends = [], []

        def _weights(self):
            weights = self.model.trainable_variables[0]
            return np.array(keras.ops.convert_to_numpy(weights.value))

        def on_epoch_begin(self, epoch, logs=None):
            self.starts.append(self._weights())

        def on_epoch_end(self, epoch, logs=None):
            self.ends.append(self._weights())

    make_self_play(
        tmp_path / "run",
        optimizer=_adam(use_ema=True, ema_momentum=0.9),
        callbacks=Recorder(),
    ).run()
    starts, ends = Recorder.starts, Recorder.ends
    np.testing.assert_array_equal(starts[1], ends[0])
    assert np.abs(starts[2] - ends[1]).max() > 1e-4
    np.testing.assert_array_equal(starts[3], ends[2])
