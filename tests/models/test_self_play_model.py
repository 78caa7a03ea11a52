import keras
import numpy as np
import pytest
from oracles import sequence_log_probs
from tiny_models import make_causal_lm, make_pairs

import keras_iris

FLOAT32_TOLERANCE = 1e-4


def _oracle(causal_lm, pairs):
    """From the causal LM's own logits, in float64."""
    length = pairs["token_ids"].shape[-1]
    flat = {k: v.reshape(-1, length) for k, v in pairs.items()}
    # Not `predict`, for which KerasHub needs TensorFlow.
    logits = causal_lm(
        {
            "token_ids": flat["token_ids"],
            "padding_mask": flat["padding_mask"].astype("int32"),
        }
    )
    return sequence_log_probs(
        keras.ops.convert_to_numpy(logits),
        flat["token_ids"],
        flat["response_mask"],
    ).reshape(-1, 2)


@pytest.mark.parametrize("architecture", ["qwen", "mistral", "llama", "gemma"])
def test_log_probs_are_those_of_the_causal_lm(architecture):
    causal_lm = make_causal_lm(architecture)
    pairs = make_pairs()
    model = keras_iris.SelfPlayModel(causal_lm)
    log_probs = model.predict(pairs, verbose=0)
    assert log_probs.dtype == "float32"
    np.testing.assert_allclose(
        log_probs, _oracle(causal_lm, pairs), rtol=FLOAT32_TOLERANCE
    )


def test_untied_qwen():
    causal_lm = make_causal_lm("qwen", tie_word_embeddings=False)
    pairs = make_pairs()
    log_probs = keras_iris.SelfPlayModel(causal_lm).predict(pairs, verbose=0)
    np.testing.assert_allclose(
        log_probs, _oracle(causal_lm, pairs), rtol=FLOAT32_TOLERANCE
    )


def test_padding_changes_nothing():
    model = keras_iris.SelfPlayModel(make_causal_lm())
    pairs = make_pairs()
    wider = {
        name: np.pad(array, [(0, 0), (0, 0), (0, 5)])
        for name, array in pairs.items()
    }
    np.testing.assert_allclose(
        model.predict(wider, verbose=0),
        model.predict(pairs, verbose=0),
        rtol=FLOAT32_TOLERANCE,
    )


def test_mixed_bfloat16_log_probs_are_float32():
    causal_lm = make_causal_lm(dtype="mixed_bfloat16")
    pairs = make_pairs()
    log_probs = keras_iris.SelfPlayModel(causal_lm).predict(pairs, verbose=0)
    assert log_probs.dtype == "float32"
    reference = make_causal_lm()
    reference.set_weights(causal_lm.get_weights())
    exact = _oracle(reference, pairs)
    num_tokens = pairs["response_mask"].sum(-1)
    assert np.max(np.abs(log_probs - exact) / num_tokens) < 2e-2


def test_alpha_is_a_variable_bound_at_compile():
    model = keras_iris.SelfPlayModel(make_causal_lm())
    model.compile(loss=keras_iris.losses.IRIS(alpha=1.5))
    assert float(model.alpha.value) == 1.5
    model.alpha.assign(0.25)
    assert float(model.loss.alpha.value) == 0.25
    assert model.alpha in model.non_trainable_variables


def test_weights_round_trip(tmp_path):
    model = keras_iris.SelfPlayModel(make_causal_lm())
    model.alpha.assign(1.75)
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras_iris.SelfPlayModel(make_causal_lm(seed=1))
    other.load_weights(tmp_path / "model.weights.h5")
    pairs = make_pairs()
    np.testing.assert_array_equal(
        other.predict(pairs, verbose=0), model.predict(pairs, verbose=0)
    )
    assert float(other.alpha.value) == 1.75


def test_whole_model_round_trip(tmp_path):
    model = keras_iris.SelfPlayModel(make_causal_lm())
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    pairs = make_pairs()
    np.testing.assert_array_equal(
        other.predict(pairs, verbose=0), model.predict(pairs, verbose=0)
    )


def test_order_round_trip(tmp_path):
    """A file has both: the order now, and that of `compile`."""
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(loss=keras_iris.losses.IRIS(2.0))
    model.optimizer.build(model.trainable_variables)
    model.alpha.assign(0.75)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    assert float(other.loss.alpha.value) == 0.75
    other.reset_order()
    assert float(other.loss.alpha.value) == 2.0
    assert other.loss_config == model.loss_config


def test_metrics_round_trip(tmp_path):
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    metrics = keras_iris.metrics.self_play_metrics()
    model.compile(loss=keras_iris.losses.IRIS(0.5), metrics=[metrics])
    pairs, opponent = make_pairs(), np.full((8, 2), -20.0, "float32")
    model.train_on_batch(pairs, opponent)
    expected = model.evaluate(pairs, opponent, return_dict=True, verbose=0)
    assert {metric.name for metric in metrics} < set(expected)
    assert expected["real_nll"] < 10.0  # nats a token
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    actual = other.evaluate(pairs, opponent, return_dict=True, verbose=0)
    assert actual == pytest.approx(expected)


def test_loss_of_two_models():
    loss = keras_iris.losses.IRIS(alpha=1.5)
    models = [keras_iris.SelfPlayModel(make_causal_lm()) for _ in range(2)]
    for model in models:
        model.compile(loss=loss)
        assert model.loss.alpha is model.alpha
    models[0].alpha.assign(0.5)
    assert [float(model.alpha.value) for model in models] == [0.5, 1.5]


def test_one_metric_and_weighted_metrics():
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(
        loss=keras_iris.losses.IRIS(),
        metrics=keras_iris.metrics.Margin(),
        weighted_metrics=["mse"],
        micro_batch_size=np.int64(2),
    )
    logs = model.evaluate(
        make_pairs(), np.zeros((8, 2)), verbose=0, return_dict=True
    )
    assert {"margin", "mse"} < set(logs)


class TestErrors:
    def test_model_without_the_parts(self):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
        with pytest.raises(ValueError, match="KerasHub `CausalLM`"):
            keras_iris.SelfPlayModel(model)

    def test_backbone_instead_of_the_causal_lm(self):
        with pytest.raises(ValueError, match="not its backbone"):
            keras_iris.SelfPlayModel(make_causal_lm().backbone)

    @pytest.mark.filterwarnings("ignore:Layer")
    def test_quantized_output_layer(self):
        causal_lm = make_causal_lm()
        causal_lm.backbone.token_embedding.quantize("int8")
        with pytest.raises(ValueError, match="has to be in float.*'int8'"):
            keras_iris.SelfPlayModel(causal_lm)

    @pytest.mark.parametrize("size", [0, -1, 2.5, True])
    def test_micro_batch_size(self, size):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="`micro_batch_size`"):
            model.compile(loss=keras_iris.losses.IRIS(), micro_batch_size=size)

    @pytest.mark.parametrize("method", ["train_on_batch", "test_on_batch"])
    @pytest.mark.parametrize("micro_batch_size", [None, 1])
    def test_no_opponent(self, method, micro_batch_size):
        model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
        model.compile(
            loss=keras_iris.losses.IRIS(), micro_batch_size=micro_batch_size
        )
        with pytest.raises(ValueError, match="opponent's log-probs"):
            getattr(model, method)(make_pairs())

    def test_loss_weights(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="scale the learning rate"):
            model.compile(loss=keras_iris.losses.SPIN(), loss_weights=2.0)

    def test_metrics_by_name_of_output(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="have to be a list"):
            model.compile(loss=keras_iris.losses.SPIN(), metrics={"a": "mse"})

    def test_loss_of_another_type(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="SelfPlayLoss"):
            model.compile(loss="mse")

    def test_adam_in_bfloat16_variables(self):
        model = keras_iris.SelfPlayModel(make_causal_lm(dtype="bfloat16"))
        with pytest.raises(ValueError, match="moves no bfloat16"):
            model.compile(optimizer="adam", loss=keras_iris.losses.IRIS())

    def test_inputs_without_a_pair_axis(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        pairs = {k: v[:, 0] for k, v in make_pairs().items()}
        with pytest.raises(ValueError, match=r"\(batch, 2, time\)"):
            model(pairs)

    def test_missing_input(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        pairs = make_pairs()
        del pairs["response_mask"]
        with pytest.raises(ValueError, match="response_mask"):
            model(pairs)


def test_without_a_loss_round_trip(tmp_path):
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(optimizer=keras.optimizers.SGD())
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    assert keras.saving.load_model(tmp_path / "model.keras").loss is None
