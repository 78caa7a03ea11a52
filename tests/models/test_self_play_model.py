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
    logits = causal_lm.predict(
        {
            "token_ids": flat["token_ids"],
            "padding_mask": flat["padding_mask"].astype("int32"),
        },
        verbose=0,
    )
    return sequence_log_probs(
        logits, flat["token_ids"], flat["response_mask"]
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
    loss = keras_iris.losses.IRIS(alpha=1.5)
    model.compile(loss=loss)
    assert float(model.alpha.value) == 1.5
    model.alpha.assign(0.25)
    assert float(loss.alpha.value) == 0.25
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


def test_lora_trains_the_adapters_alone():
    causal_lm = make_causal_lm()
    causal_lm.backbone.enable_lora(rank=2)
    for layer in causal_lm.backbone._flatten_layers():
        for variable in layer.trainable_variables:
            variable.trainable = "lora" in variable.name
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(optimizer="sgd", loss=keras_iris.losses.IRIS())
    before = [v.numpy() for v in causal_lm.backbone.variables]
    pairs = make_pairs()
    model.fit(pairs, model.predict(pairs, verbose=0), verbose=0, epochs=2)
    names = {
        variable.name
        for variable, old in zip(
            causal_lm.backbone.variables, before, strict=True
        )
        if not np.array_equal(variable.numpy(), old)
    }
    assert names and all("lora" in name for name in names)


class TestErrors:
    def test_model_without_the_parts(self):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
        with pytest.raises(ValueError, match="KerasHub `CausalLM`"):
            keras_iris.SelfPlayModel(model)

    def test_backbone_instead_of_the_causal_lm(self):
        with pytest.raises(ValueError, match="not its backbone"):
            keras_iris.SelfPlayModel(make_causal_lm().backbone)

    @pytest.mark.parametrize("size", [0, -1, 2.5])
    def test_micro_batch_size(self, size):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="`micro_batch_size`"):
            model.compile(loss=keras_iris.losses.IRIS(), micro_batch_size=size)

    def test_loss_of_another_type(self):
        model = keras_iris.SelfPlayModel(make_causal_lm())
        with pytest.raises(ValueError, match="SelfPlayLoss"):
            model.compile(loss="mse")

    def test_adam_in_bfloat16_variables(self):
        model = keras_iris.SelfPlayModel(make_causal_lm(dtype="bfloat16"))
        with pytest.raises(ValueError, match="beta_2"):
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
