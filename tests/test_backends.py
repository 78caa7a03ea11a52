"""The same program gives the same numbers on the three backends."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from programs import environment

LOG_PROB_TOLERANCE = 1e-4  # nats, float32
RELATIVE_TOLERANCE = 1e-4  # of losses and gradients

PROGRAM = """
import sys
import keras, numpy as np
import keras_iris
from tiny_models import make_causal_lm, make_pairs

source, target = sys.argv[1:]
causal_lm = make_causal_lm("mistral", num_layers=1)
weights = np.load(source)
causal_lm.set_weights([weights[f"{i:04d}"] for i in range(len(weights.files))])
pairs = make_pairs()
log_probs = keras_iris.SelfPlayModel(causal_lm).predict(pairs, verbose=0)
results = {"log_probs": log_probs}
opponent = log_probs + np.linspace(-1, 1, 16).reshape(8, 2)
opponent = opponent.astype("float32")
for name, loss in {
    "iris": keras_iris.losses.IRIS(alpha=1.5),
    "spin": keras_iris.losses.SPIN(beta=1.0),
}.items():
    model = keras_iris.SelfPlayModel(causal_lm)
    # One step of SGD at rate 1: the change is minus the gradient.
    model.compile(
        optimizer=keras.optimizers.SGD(1.0), loss=loss, micro_batch_size=3
    )
    before = causal_lm.get_weights()
    results[f"{name}_loss"] = model.train_on_batch(pairs, opponent)
    for i, (new, old) in enumerate(zip(causal_lm.get_weights(), before)):
        results[f"{name}_gradient_{i:04d}"] = old - new
    causal_lm.set_weights(before)
np.savez(target, **results)
"""


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="runs all three backends itself"
)
def test_same_numbers(tmp_path):
    from tiny_models import make_causal_lm

    causal_lm = make_causal_lm("mistral", num_layers=1)
    weights = causal_lm.get_weights()
    source = tmp_path / "weights.npz"
    np.savez(source, **{f"{i:04d}": w for i, w in enumerate(weights)})
    results = {}
    for backend in ("jax", "torch", "tensorflow"):
        target = tmp_path / f"{backend}.npz"
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(source), str(target)],
            env=environment(KERAS_BACKEND=backend),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        results[backend] = dict(np.load(target))
    expected = results.pop("jax")
    for backend, actual in results.items():
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            if name == "log_probs":
                difference = np.max(np.abs(actual[name] - value))
                assert difference < LOG_PROB_TOLERANCE, backend
                continue
            # Relative to the whole gradient: some true gradients are zero.
            prefix = name.rsplit("_", 1)[0]
            scale = np.sqrt(
                sum(
                    np.sum(np.square(v, dtype="float64"))
                    for n, v in expected.items()
                    if n.startswith(prefix)
                )
            )
            difference = np.linalg.norm(actual[name] - value)
            assert difference < RELATIVE_TOLERANCE * scale, (backend, name)
