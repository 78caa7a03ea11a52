"""Sharded runs give one device's numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_iris.distribution import ShardedParallel

TOLERANCE = 1e-5  # float32, relative: sums in another order
LARGEST_SHARE = 1.15  # of an equal one; norms and biases are whole

PROGRAM = """
import json, sys
import keras, numpy as np
import keras_iris
from keras_iris.distribution import ShardedParallel
from tiny_models import make_pairs

def run(folder, options):
    causal_lm = keras_iris.load(folder, remat=True, **options)
    for variable in causal_lm.trainable_variables:
        if "lora" in variable.path:
            shape = tuple(variable.shape)
            variable.assign(np.random.default_rng(0).normal(0, 0.1, shape))
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.RMSprop(1e-3),
        loss=keras_iris.losses.IRIS(alpha=1.5),
        micro_batch_size=4,
    )
    pairs = make_pairs(batch_size=8)
    opponent = model.predict(pairs, verbose=0)
    losses = [model.train_on_batch(pairs, opponent) for _ in range(3)]
    engine = keras_iris.generation.KerasEngine(
        causal_lm, end_token_ids=(2,), max_new_tokens=5, batch_size=8
    )
    completions = engine.generate([[5, 6, 7]] * 8, seed=0)
    variables = causal_lm.variables + model.optimizer.variables
    sizes = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            device = shard.device.id
            sizes[device] = sizes.get(device, 0) + shard.data.nbytes
    total = sum(variable.value.nbytes for variable in variables)
    share = max(sizes.values()) * len(sizes) / total
    tokens = [c.token_ids for c in completions]
    return opponent.tolist(), np.asarray(losses).tolist(), tokens, share

folder, target, options = sys.argv[1:]
one = run(folder, json.loads(options))
keras.distribution.set_distribution(ShardedParallel(4))
four = run(folder, json.loads(options))
with open(target, "w") as file:
    json.dump([one, four], file)
"""


def run_on_four_devices(program, *arguments):
    tests = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mistral", {}),
        pytest.param("qwen2", {"lora_rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_sharded(architecture, options, checkpoint, tmp_path):
    target = tmp_path / "results.json"
    options = json.dumps(options)
    run_on_four_devices(PROGRAM, checkpoint(architecture), target, options)
    one, four = json.loads(target.read_text())
    for expected, actual in zip(one[:2], four[:2], strict=True):
        np.testing.assert_allclose(
            actual, expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    assert four[2] == one[2]  # generated tokens
    assert one[3] == 1
    assert four[3] < LARGEST_SHARE


DATA_PARALLEL = """
import json, sys
import jax, keras, numpy as np
from keras_iris.models import log_probs

# One tile, as XLA counts the body of a loop once.
log_probs._CPU_TILE = (4096, 4096)
rng = np.random.default_rng(0)
hidden = rng.standard_normal((8, 33, 16), "float32")
ids = rng.integers(0, 128, (8, 33))
mask = rng.random((8, 33)) < 0.7

def run():
    keras.utils.set_random_seed(0)
    head = keras.layers.ReversibleEmbedding(128, 16)
    head.build()
    table = head.embeddings

    def loss(value, hidden, ids, mask):
        with keras.StatelessScope(state_mapping=[(table, value)]):
            found = log_probs.sequence_log_probs(hidden, ids, mask, head=head)
        return found.sum()

    batch = (hidden, ids, mask)
    distribution = keras.distribution.distribution()
    if distribution is not None:
        layouts = [distribution.get_data_layout(a.shape) for a in batch]
        batch = [
            jax.device_put(array, layout.backend_layout)
            for array, layout in zip(batch, layouts)
        ]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    compiled = step.lower(table.value, *batch).compile()
    value, (by_table, by_hidden) = compiled(table.value, *batch)
    numbers = np.concatenate([np.ravel(by_table), np.ravel(by_hidden)])
    return [float(value), *numbers.tolist()], compiled.cost_analysis()["flops"]

one = run()
keras.distribution.set_distribution(keras.distribution.DataParallel())
with open(sys.argv[1], "w") as file:
    json.dump([one, run()], file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_data_parallel_cuts_the_head_along_the_batch(tmp_path):
    target = tmp_path / "results.json"
    run_on_four_devices(DATA_PARALLEL, target)
    (expected, flops), (actual, flops_of_a_device) = json.loads(
        target.read_text()
    )
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert flops_of_a_device < 0.3 * flops


def test_sharding_that_cannot_be():
    is_jax = keras.backend.backend() == "jax"
    message = "from 1 to" if is_jax else "KERAS_BACKEND=jax"
    with pytest.raises(ValueError, match=message):
        ShardedParallel(1000)
