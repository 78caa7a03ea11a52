"""SIGTERM ends a run with a checkpoint; a step without memory says so."""

import os
import signal

import keras
import pytest
from self_play_helpers import assert_same_end, lines_of, make_self_play

from keras_iris.callbacks import AlphaScheduler, SelfPlayCallback


def _terminate():
    os.kill(os.getpid(), signal.SIGTERM)


class TerminateAt(SelfPlayCallback):
    """Sends SIGTERM at a step of an epoch, or after generation."""

    def __init__(self, batch=None):
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            _terminate()

    def on_generate_end(self, iteration, responses, timing):
        if self.batch is None:
            _terminate()


# In the first step, in the last of an epoch, and outside of a `fit`.
@pytest.mark.parametrize(("batch", "num_steps"), [(0, 1), (2, 3), (None, 0)])
def test_sigterm(batch, num_steps, tmp_path, finished):
    before = signal.getsignal(signal.SIGTERM)
    run = make_self_play(
        tmp_path,
        checkpoint_every_steps=None,
        callbacks=[AlphaScheduler(), TerminateAt(batch)],
    )
    with pytest.raises(SystemExit) as error:
        run.run()
    assert error.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(lines_of(tmp_path, "step")) == num_steps
    make_self_play(tmp_path).run()
    assert len(lines_of(tmp_path, "step")) == 12
    assert_same_end(tmp_path, finished)


class Exhaust(keras.callbacks.Callback):
    """Asks the backend for more memory than there can be."""

    def on_train_batch_end(self, batch, logs=None):
        keras.ops.zeros((10**7, 10**8))


@pytest.mark.parametrize(
    ("size", "advice"), [(None, "micro_batch_size=4"), (1, "remat=True")]
)
def test_out_of_memory(size, advice, tmp_path):
    run = make_self_play(
        tmp_path,
        callbacks=[Exhaust()],
        compile_options={"micro_batch_size": size},
    )
    with pytest.raises(MemoryError, match=f"with batch_size=8 .*{advice}"):
        run.run()
