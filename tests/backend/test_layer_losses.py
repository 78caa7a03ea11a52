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
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    backbone = models.QwenMoeBackbone(
        moe_intermediate_dim=16,
        shared_expert_intermediate_dim=16,
        tie_word_embeddings=True,
        router_aux_loss_coefficient=coefficient,
        **SIZES,
    )
    return models.QwenMoeCausalLM(backbone=backbone, preprocessor=None)


def _mixtral(coefficient):
    keras.utils.set_random_seed(0)
    models = keras_hub.models
    backbone = models.MixtralBackbone(router_aux_loss_coef=coefficient, **SIZES)
    return models.MixtralCausalLM(backbone=backbone, preprocessor=None)


def _model(causal_lm, micro_batch_size):
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        keras.optimizers.SGD(0.1),
        keras_iris.losses.IRIS(),
        micro_batch_size=micro_batch_size,
    )
    return model


@pytest.mark.parametrize("make", [_qwen_moe, _mixtral])
def test_the_routers_loss(make):
    losses = [
        _model(make(coefficient), None).train_on_batch(PAIRS, OPPONENT)
        for coefficient in (0.0, 1.0, 2.0)
    ]
    none, once, twice = map(float, losses)
    assert once - none > 0.5
    assert twice - once == pytest.approx(once - none, rel=1e-3)
    model = _model(make(1.0), 3)
    with pytest.raises(ValueError, match="1 such losses with micro_batch_size"):
        model.fit(PAIRS, OPPONENT, verbose=0)
    model.evaluate(PAIRS, OPPONENT, verbose=0)  # has none


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
