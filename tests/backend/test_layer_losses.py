"""Losses that layers add are in the whole batch's, or refused."""

import keras
import keras_hub
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm, make_pairs

import keras_iris
from keras_iris.models.remat import remat_layers

PAIRS, OPPONENT = make_pairs(), np.full((8, 2), -20.0, "float32")
SIZES = dict(
    vocabulary_size=VOCABULARY_SIZE,
    num_layers=1,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    intermediate_dim=32,
    num_experts=4,
    top_k=2,
)


def _qwen_moe(coefficient):
    return make_causal_lm(
        "qwen_moe", router_aux_loss_coefficient=coefficient, **SIZES
    )


def _mixtral(coefficient):
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    backbone = models.MixtralBackbone(router_aux_loss_coef=coefficient, **SIZES)
    return models.MixtralCausalLM(backbone=backbone, preprocessor=None)


def _model(causal_lm, micro_batch_size, rate=0.1):
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        keras.optimizers.SGD(rate),
        keras_iris.losses.IRIS(),
        micro_batch_size=micro_batch_size,
    )
    return model


def _trained(causal_lm, micro_batch_size):
    """The loss of a batch, and the weights after a step of size 1."""
    model = _model(causal_lm, micro_batch_size, 1.0)
    loss = model.fit(PAIRS, OPPONENT, batch_size=8, verbose=0).history["loss"]
    return loss, [keras.ops.convert_to_numpy(v) for v in causal_lm.variables]


@pytest.mark.parametrize("make, size", [(_qwen_moe, 3), (_mixtral, 4)])
def test_the_routers_loss(make, size):
    """Keras' own step is the oracle; 8 pairs are 3 + 3 + 2, or 4 + 4."""
    start = [keras.ops.convert_to_numpy(v) for v in make(0.0).variables]
    (without,), _ = _trained(make(0.0), None)
    (loss,), weights = _trained(make(3.0), None)
    assert loss - without > 1.0
    (loss_of_parts,), weights_of_parts = _trained(make(3.0), size)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)
    for before, expected, result in zip(
        start, weights, weights_of_parts, strict=True
    ):
        step = np.abs(expected - before).max()
        np.testing.assert_allclose(result, expected, atol=1e-5 + 1e-4 * step)


@pytest.mark.parametrize("make", [_qwen_moe, _mixtral])
def test_evaluation_has_no_routers_loss(make):
    results = [
        _model(make(coefficient), size).evaluate(PAIRS, OPPONENT, verbose=0)
        for coefficient, size in ((0.0, None), (3.0, 3))
    ]
    np.testing.assert_allclose(*results, rtol=1e-5)


@pytest.mark.parametrize("make", [_qwen_moe, _mixtral])
def test_the_routers_loss_of_rematerialised_layers(make):
    causal_lm = make(1.0)
    remat_layers(causal_lm.backbone)
    model = _model(causal_lm, None)
    with pytest.raises(ValueError, match="without rematerialisation"):
        model.fit(PAIRS, OPPONENT, verbose=0)
    model.evaluate(PAIRS, OPPONENT, verbose=0)


def test_activity_regularizer():
    causal_lm = make_causal_lm(num_layers=1)
    layer = causal_lm.backbone.token_embedding
    layer.activity_regularizer = keras.regularizers.L2(0.1)
    model = _model(causal_lm, 2)
    for method in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match="activity_regularizer"):
            method(PAIRS, OPPONENT, verbose=0)


def test_weight_regularizers():
    """Which don't depend on the batch."""
    values = []
    for size in (None, 3):
        model = _model(make_causal_lm(num_layers=1), size)
        head = model.causal_lm.backbone.token_embedding
        head.embeddings.regularizer = keras.regularizers.L2(0.1)
        loss = model.train_on_batch(PAIRS, OPPONENT)
        values.append((float(loss), head.embeddings.numpy()))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    np.testing.assert_allclose(values[0][1], values[1][1], atol=1e-5)
