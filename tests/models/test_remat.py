"""Rematerialised layers compute the same with less memory."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

from keras_iris.models import Lora, add_lora
from keras_iris.models.remat import remat_layers

TOLERANCE = 1e-5  # float32 gradients, summed in another order
is_jax = keras.backend.backend() == "jax"


def make_batch(batch_size=2, length=12):
    rng = np.random.default_rng(0)
    shape = (batch_size, length)
    token_ids = rng.integers(0, VOCABULARY_SIZE, shape).astype("int32")
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def train_once(causal_lm):
    """Weights after a step whose size is the gradient's."""
    causal_lm.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile="auto" if is_jax else False,
    )
    inputs = make_batch()
    targets = np.roll(inputs["token_ids"], -1, axis=1)
    loss = causal_lm.train_on_batch(inputs, targets)
    variables = causal_lm.backbone.trainable_variables
    return loss, [keras.ops.convert_to_numpy(v) for v in variables]


@pytest.mark.parametrize(
    "architecture, lora",
    [("qwen", False), ("qwen", True), ("mistral", False), ("gemma", False)],
)
def test_same_step(architecture, lora):
    results = []
    for remat in (False, True):
        causal_lm = make_causal_lm(architecture)
        if lora:
            add_lora(causal_lm.backbone, Lora(2, targets="all"))
        if remat:
            remat_layers(causal_lm.backbone)
        results.append(train_once(causal_lm))
    (loss, weights), (loss_remat, weights_remat) = results
    np.testing.assert_allclose(loss_remat, loss, rtol=TOLERANCE)
    for expected, received in zip(weights, weights_remat, strict=True):
        np.testing.assert_allclose(received, expected, atol=TOLERANCE)


def test_twice_is_once():
    causal_lm = make_causal_lm("qwen")
    remat_layers(causal_lm.backbone)
    calls = [layer.call for layer in causal_lm.backbone.transformer_layers]
    remat_layers(causal_lm.backbone)
    layers = causal_lm.backbone.transformer_layers
    assert [layer.call for layer in layers] == calls


def test_what_cannot_be_computed_again_is_refused():
    causal_lm = make_causal_lm("qwen", dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout 0\.1 in .*dropout=0\.0"):
        remat_layers(causal_lm.backbone)
    with pytest.raises(ValueError, match="Pass `causal_lm.backbone`"):
        remat_layers(causal_lm)


def test_generation_is_untouched():
    prompt = make_batch()
    length = 2 * prompt["token_ids"].shape[1]
    padding = ((0, 0), (0, length // 2))
    prompt = {name: np.pad(ids, padding) for name, ids in prompt.items()}
    outputs = []
    for remat in (False, True):
        causal_lm = make_causal_lm("qwen")
        if remat:
            remat_layers(causal_lm.backbone)
        causal_lm.compile(sampler="greedy")
        generated = causal_lm.generate(
            prompt, max_length=length, stop_token_ids=None
        )
        outputs.append(keras.ops.convert_to_numpy(generated["token_ids"]))
    np.testing.assert_array_equal(*outputs)


_MEASURE = """
import jax
import keras
import numpy as np
from tiny_models import make_causal_lm

from keras_iris.models import Lora, add_lora
from keras_iris.models.remat import remat_layers


def measure(remat):
    backbone = make_causal_lm("qwen", num_layers=24).backbone
    if remat:
        remat_layers(backbone)

    def loss(trainable, inputs):
        hidden_states, _ = backbone.stateless_call(
            trainable, [], inputs, training=True
        )
        return keras.ops.mean(hidden_states**2)

    ids = np.ones((1, 1024), "int32")
    trainable = [v.value for v in backbone.trainable_variables]
    inputs = {"token_ids": ids, "padding_mask": ids}
    compiled = jax.jit(jax.grad(loss)).lower(trainable, inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


print(measure(False) / measure(True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_jax, reason="measures with XLA")
def test_memory():
    """24 layers of 1,024 tokens: at most a third of the temporary memory."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # The CPU's default scheduler recomputes all layers at once.
        "XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    }
    output = subprocess.run(
        [sys.executable, "-c", _MEASURE],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert float(output.split()[-1]) >= 3
