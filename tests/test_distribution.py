"""Sharded runs give one device's numbers; estimates against real models."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_iris
from keras_iris.distribution import RunEstimate, ShardedParallel
from keras_iris.hub.checkpoint import read_json
from keras_iris.hub.decoder_config import DecoderConfig

RECIPES = Path(__file__).parents[1] / "recipes"
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
    [("mistral", {}), ("qwen2", {"lora_rank": 2})],
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


# Published sizes; the numbers of weights are those of the model cards.
ZEPHYR = DecoderConfig.from_json(
    {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)
QWEN = DecoderConfig.from_json(
    {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)
GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def _estimate(config, **changes):
    options = dict(
        num_prompts=1000,
        prompt_length=100.0,
        response_length=60.0,
        new_tokens=40,
        max_length=2048,
        iterations=3,
        epochs=2,
        micro_batch_size=4,
        generation_batch_size=16,
    )
    return RunEstimate(config=config, **{**options, **changes})


def _bytes(variables):
    return sum(
        math.prod(v.shape)
        * ITEM_BYTES[keras.backend.standardize_dtype(v.dtype)]
        for v in variables
    )


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "llama", "gemma"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_memory_of_variables(architecture, lora_rank, checkpoint):
    folder = checkpoint(architecture)
    causal_lm = keras_iris.load(
        folder,
        dtype="mixed_bfloat16" if lora_rank is None else "bfloat16",
        lora_rank=lora_rank,
    )
    config = DecoderConfig.from_json(read_json(folder / "config.json"))
    estimate = _estimate(config, lora_rank=lora_rank)
    trained = causal_lm.trainable_variables
    assert estimate.num_trained == sum(math.prod(v.shape) for v in trained)
    memory = estimate.memory()
    assert memory["weights"] == _bytes(causal_lm.backbone.weights)
    optimizer = keras.optimizers.RMSprop()
    optimizer.build(trained)
    slots = [v for v in optimizer.variables if len(v.shape)]
    assert memory["optimizer"] == _bytes(slots)


def test_memory_of_quantized_weights(checkpoint):
    folder = checkpoint("qwen2")
    causal_lm = keras_iris.load(
        folder, dtype="bfloat16", lora_rank=4, quantize="int8"
    )
    config = DecoderConfig.from_json(read_json(folder / "config.json"))
    estimate = _estimate(config, lora_rank=4, quantize="int8")
    # The scales of tiny matrices are many for so few numbers.
    variables = [
        v for v in causal_lm.backbone.weights if not v.name.endswith("_scale")
    ]
    assert estimate.memory()["weights"] == _bytes(variables)


@pytest.mark.parametrize(
    ("config", "num_weights", "full", "lora", "quantized"),
    [
        (ZEPHYR, 7_241_732_096, 107.9, 13.5, 6.9),
        (QWEN, 3_085_938_688, 46.0, 5.7, 3.2),
    ],
)
def test_memory_of_the_papers_models(
    config, num_weights, full, lora, quantized
):
    estimate = _estimate(config, optimizer_slots=2)
    assert estimate.num_weights == num_weights
    memory = estimate.memory()
    # Weights, gradients and Adam's two slots, 4 bytes each.
    sixteen = ("weights", "gradients", "optimizer")
    assert sum(memory[n] for n in sixteen) / GIB == pytest.approx(full, abs=0.1)
    for quantize, expected in ((None, lora), ("int8", quantized)):
        estimate = _estimate(config, lora_rank=16, quantize=quantize)
        base = estimate.memory()["weights"] - 4 * estimate.num_trained
        assert base / GIB == pytest.approx(expected, abs=0.1)


def test_memory_of_activations_and_cache():
    memory = _estimate(ZEPHYR).memory()
    tokens = 8 * 2048  # 4 pairs
    inputs = 32 * tokens * 4096 * 2  # of 32 layers, bfloat16
    scores = 8 * 32 * 2048**2 * (4 + 2)
    # Twice one layer: normalised, queries, keys, values, feed-forward.
    layer = tokens * 2 * (2 * 4096 + 2 * 4096 + 2 * 1024 + 4 * 14336)
    assert memory["activations"] == inputs + scores + 2 * layer
    # 32 layers, keys and values, 8 heads of 128, bfloat16.
    assert memory["key-value cache"] == 16 * 2048 * 32 * 2 * 8 * 128 * 2


def test_memory_of_shards():
    one, eight = (_estimate(ZEPHYR, num_devices=n).memory() for n in (1, 8))
    shared = one.pop("logits")
    for name in one:
        rest = shared if name == "training" else 0
        assert eight[name] - rest == pytest.approx((one[name] - rest) / 8)


@pytest.mark.parametrize(
    ("recipe", "config", "line", "changes"),
    [
        ("zephyr_7b", ZEPHYR, "LoRA of rank 16", {"lora_rank": 16}),
        (
            "zephyr_7b",
            ZEPHYR,
            "LoRA, int8 base",
            {"lora_rank": 16, "quantize": "int8"},
        ),
        ("zephyr_7b", ZEPHYR, "all weights, on 8 devices", {"num_devices": 8}),
        ("qwen2_5_3b", QWEN, "LoRA of rank 16", {"lora_rank": 16}),
        ("qwen2_5_3b", QWEN, "all weights", {}),
        ("qwen2_5_3b", QWEN, "all weights, on 8 devices", {"num_devices": 8}),
    ],
)
def test_memory_that_the_recipes_tell(recipe, config, line, changes):
    text = (RECIPES / f"{recipe}.py").read_text()
    [told] = re.findall(rf"^ +{re.escape(line)} +(\d+) GiB$", text, re.M)
    memory = _estimate(
        config, micro_batch_size=8, generation_batch_size=32, **changes
    ).memory()
    largest = max(memory["training"], memory["generation"])
    assert round(largest / GIB) == int(told)


def test_disk():
    num_weights = 7_241_732_096
    disk = _estimate(ZEPHYR).disk(needs_folder=True)
    assert disk["checkpoints"] == 4 * 8 * num_weights
    assert disk["engine's model"] == 2 * disk["trained model"]
    assert disk["trained model"] == 2 * num_weights
    assert disk["tokens"] == 4 * 1000 * (160 + 3 * 40)
    assert _estimate(ZEPHYR).disk(needs_folder=False)["engine's model"] == 0


def test_seconds():
    def seconds(**changes):
        return _estimate(ZEPHYR, **changes).seconds(
            flops_per_second=1e14, bytes_per_second=1e12
        )

    # Matrices alone: the embeddings are only looked up.
    forward = 2 * (7_241_732_096 - 32000 * 4096) / 1e14
    pairs = 1000 * (100 + 60 + 100 + 40)
    plain = seconds()
    # Forward, again for remat, and backward as two.
    assert plain["training"] == pytest.approx(3 * 2 * 4 * forward * pairs)
    assert plain["scoring"] == pytest.approx(3 * forward * pairs)
    # 16 answers for a reading of the weights; prompts at once.
    step = 4 * 7_241_732_096 / 1e12
    assert step / 16 > forward
    assert plain["generation"] == pytest.approx(
        3 * 1000 * (100 * forward + 40 * step / 16)
    )
    assert seconds(lora_rank=16)["training"] == pytest.approx(
        plain["training"] * 3 / 4
    )
    for name, time in seconds(num_devices=8).items():
        assert time == pytest.approx(plain[name] / 8)
