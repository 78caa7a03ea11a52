"""Architectures without a row: refused by `load`, or what its warning says.

`make matrix` writes what is recorded here into docs/architectures.md.
"""

import keras
import numpy as np
import pytest
from reference import (
    check_greedy,
    expected_model,
    logits_from,
    logits_of,
    random_ids,
    take_step,
)
from tiny_checkpoints import OTHERS
from tiny_models import make_pairs

from keras_iris import SelfPlayModel, losses
from keras_iris.hub import load

TOLERANCE = 1e-4  # nats
NUM_NEW_TOKENS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:keras_iris has no tests for models"),
]


@pytest.mark.parametrize("architecture", OTHERS)
def test_other(checkpoint, architecture, record_property):
    folder = checkpoint(architecture)
    try:
        causal_lm = load(folder, dtype="float32")
    except ValueError as error:
        record_property("loads", str(error).replace(str(folder), "the folder"))
        return
    record_property("loads", "yes")
    difference = _difference(causal_lm, expected_model(folder))
    record_property("log-probs", f"within {difference:.0e}")
    assert difference < TOLERANCE
    check_greedy(causal_lm, folder, NUM_NEW_TOKENS)
    record_property("generates", "yes")
    model = SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.SGD(0.1), losses.SFT(), jit_compile=False)
    pairs = make_pairs(batch_size=2)
    model.train_on_batch(pairs, np.zeros((2, 2), "float32"))
    expected = expected_model(folder)
    take_step(expected, pairs)
    assert _difference(causal_lm, expected) < TOLERANCE
    record_property("trains", "yes")


def _difference(causal_lm, model):
    """Of log-probs, on average."""
    token_ids = random_ids()
    logits = logits_of(causal_lm, token_ids), logits_from(model, token_ids)
    ours, theirs = (keras.ops.log_softmax(x) for x in logits)
    return float(keras.ops.mean(keras.ops.abs(ours - theirs)))
