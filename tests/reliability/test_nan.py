"""NaN in a gradient whose loss is finite; tests/self_play/test_errors.py has
the rest."""

import warnings

import keras
import numpy as np
import pytest
from self_play_helpers import final_arrays, make_self_play


class _NanGradients(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        super().apply([g * np.nan for g in grads], trainable_variables)


@pytest.mark.parametrize("checkpoint_every_steps", [1, 100])
def test_nan_in_the_gradient(checkpoint_every_steps, tmp_path):
    """The error comes within two steps, and no checkpoint has it."""
    self_play = make_self_play(
        tmp_path,
        optimizer=_NanGradients(0.01),
        checkpoint_every_steps=checkpoint_every_steps,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(FloatingPointError, match="not finite|examples"):
            self_play.run()
    assert int(self_play.model.optimizer.iterations) <= 2
    for array in final_arrays(tmp_path).values():
        assert np.isfinite(array.astype("float64")).all()
