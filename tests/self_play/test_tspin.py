"""T-SPIN learns from the responses of the first policy as well."""

import numpy as np
import pytest
from self_play_helpers import Stop, assert_same_end, lines_of, make_self_play

from keras_iris.losses import TSPIN
from keras_iris.self_play.arrays import read_responses


def _make(run_dir, **options):
    """A run; and the data sets of its iterations, as they are made."""
    self_play = make_self_play(
        run_dir,
        evaluate=None,
        compile_options={"loss": TSPIN(), "micro_batch_size": 4},
        **options,
    )
    datasets, make_pairs = [], self_play._make_pairs

    def make(*arguments):
        datasets.append(make_pairs(*arguments))
        return datasets[-1]

    self_play._make_pairs = make
    return self_play, datasets


def test_responses_of_the_first_iteration(tmp_path):
    whole = tmp_path / "whole"
    self_play, datasets = _make(whole, callbacks=[])
    self_play.run()
    first, second = datasets
    x, y, _ = first[0]
    assert x["token_ids"].shape[1] == y.shape[1] == 2
    x, y, _ = second[0]
    assert x["token_ids"].shape[1] == y.shape[1] == 3
    proto = read_responses(whole, 1, 24)
    for row, number in enumerate(second.indices(0)):
        mask = x["response_mask"][row, 2]
        ids = x["token_ids"][row, 2][mask]
        np.testing.assert_array_equal(ids, proto[number])
    assert (y[:, 2] < 0).all()

    # Cut off in the second iteration, it ends in the same weights.
    stopped = tmp_path / "stopped"

    class StopLater(Stop):
        def on_train_begin(self, logs=None):
            self.fits = getattr(self, "fits", 0) + 1

        def on_train_batch_end(self, batch, logs=None):
            if self.fits == 2:
                super().on_train_batch_end(batch, logs)

    _make(stopped, callbacks=[StopLater(1)])[0].run()
    assert len(lines_of(stopped, "step")) == 8
    _make(stopped, callbacks=[])[0].run()
    assert_same_end(stopped, whole)


def test_lost_responses_of_the_first_iteration(tmp_path):
    self_play, _ = _make(tmp_path, callbacks=[], iterations=1)
    self_play.run()
    next((tmp_path / "iteration_001" / "synthetic").iterdir()).unlink()
    longer, _ = _make(tmp_path, callbacks=[])
    with pytest.raises(
        ValueError, match="synthetic has .* responses, expected 24"
    ):
        longer.run()
