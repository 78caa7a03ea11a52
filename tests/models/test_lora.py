"""Adapters beside layers: what trains, what is kept, what is refused."""

import keras
import numpy as np
import pytest
from self_play_helpers import Stop, assert_same_end, make_examples
from tiny_models import VOCABULARY_SIZE, make_causal_lm, make_pairs

import keras_iris
from keras_iris.models import Lora, add_lora
from keras_iris.models.lora import ROLES, find_lora, lora_layers
from keras_iris.models.remat import remat_layers

PAIRS, OPPONENT = make_pairs(), np.full((8, 2), -20.0, "float32")


def make_model(lora=None, quantize=None, **options):
    causal_lm = make_causal_lm(num_layers=1, hidden_dim=32, **options)
    if quantize:
        kinds = (keras.layers.Dense, keras.layers.EinsumDense)
        causal_lm.quantize(quantize, filters=lambda x: isinstance(x, kinds))
    add_lora(causal_lm.backbone, lora or Lora(2, targets="all"))
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.Adam(0.01), keras_iris.losses.IRIS())
    return model


def adapters(model):
    return [
        keras.ops.convert_to_numpy(v)
        for layer in lora_layers(model.causal_lm.backbone)
        for v in (layer.lora_a, layer.lora_b)
    ]


def step(model):
    return model.train_on_batch(PAIRS, OPPONENT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_the_adapters_alone(dtype):
    model = make_model(dtype=dtype, seed=3)
    backbone = model.causal_lm.backbone
    assert [v.dtype for v in model.trainable_variables] == 14 * ["float32"]
    assert {v.dtype for v in backbone.non_trainable_variables} == {dtype}
    plain = make_causal_lm(num_layers=1, dtype=dtype, seed=3)
    before = keras_iris.SelfPlayModel(plain).predict(PAIRS, verbose=0)
    np.testing.assert_array_equal(model.predict(PAIRS, verbose=0), before)
    frozen = [np.array(v) for v in backbone.non_trainable_variables]
    starts = adapters(model)
    step(model)  # moves B; A's gradient is 0 where B is
    step(model)
    for old, new in zip(starts, adapters(model), strict=True):
        assert np.abs(new - old).max() > 1e-3
    for old, new in zip(frozen, backbone.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(old, np.array(new))


def test_micro_batches_of_layers_computed_again():
    whole, parts = make_model(), make_model()
    remat_layers(parts.causal_lm.backbone)
    parts.compile(
        keras.optimizers.SGD(1.0), keras_iris.losses.IRIS(), micro_batch_size=3
    )
    whole.compile(keras.optimizers.SGD(1.0), keras_iris.losses.IRIS())
    starts = adapters(whole)
    for model in (whole, parts):
        step(model)
    ends = adapters(whole)
    assert all(
        np.abs(b - a).max() > 1e-3
        for a, b in zip(starts[1::2], ends[1::2], strict=True)
    )
    for left, right in zip(ends, adapters(parts), strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-4, atol=1e-6)


def test_starts_as_in_peft():
    # torch.nn.init.kaiming_uniform_(A, a=sqrt(5)): uniform in 1 / sqrt(inputs)
    keras.utils.set_random_seed(1)
    first = adapters(make_model(Lora(8, targets="all")))
    keras.utils.set_random_seed(2)
    for one, other in zip(
        first, adapters(make_model(Lora(8, targets="all"))), strict=True
    ):
        np.testing.assert_array_equal(one, other)  # in every process
    for a, b in zip(first[::2], first[1::2], strict=True):
        bound = a.shape[0] ** -0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not b.any()
    values = np.concatenate([a.ravel() for a in first[::2]])
    assert len(np.unique(values)) > 0.99 * len(values)


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        ("weights.h5", None),
        ("weights.h5", "int4"),
        ("keras", None),
        ("keras", "int8"),
    ],
)
def test_keras_files_hold_adapters(kind, quantize, tmp_path, monkeypatch):
    # Keras collects garbage for each layer that it quantizes.
    monkeypatch.setattr("gc.collect", lambda: 0)
    lora = Lora(2, 3.0, ("value", "down"))
    model = make_model(lora, quantize)
    step(model)
    path = tmp_path / f"model.{kind}"
    if kind == "keras":
        model.save(path)
        again = keras.saving.load_model(path)
        assert find_lora(again.causal_lm.backbone) == lora
        assert len(again.trainable_variables) == 4
    else:
        model.save_weights(path)
        again = make_model(lora, quantize, seed=5)
        step(again)
        again.load_weights(path)
    for left, right in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(np.array(left), np.array(right))
    # The optimizer's state as well.
    assert step(again) == step(model)
    for left, right in zip(adapters(model), adapters(again), strict=True):
        np.testing.assert_array_equal(left, right)


def test_weights_of_a_model_without_adapters(tmp_path):
    plain = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    plain.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected .* variables"):
        make_model().load_weights(tmp_path / "model.weights.h5")


def test_backup_and_restore(tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise InterruptedError

    def fit(model, *callbacks):
        options = dict(epochs=2, shuffle=False, verbose=0)
        model.fit(PAIRS, OPPONENT, callbacks=callbacks, **options)

    crashed, whole, restored = (make_model() for _ in range(3))
    with pytest.raises(InterruptedError):
        fit(crashed, keras.callbacks.BackupAndRestore(tmp_path), Crash())
    fit(restored, keras.callbacks.BackupAndRestore(tmp_path))
    fit(whole)
    for left, right in zip(adapters(whole), adapters(restored), strict=True):
        np.testing.assert_array_equal(left, right)


def test_self_play_goes_on_with_adapters(tmp_path):
    def run(folder, *callbacks):
        keras_iris.SelfPlay(
            make_model(),
            make_examples(),
            folder,
            iterations=1,
            batch_size=8,
            max_response_length=6,
            callbacks=callbacks,
        ).run()

    run(tmp_path / "whole")
    run(tmp_path / "cut", Stop(1))
    run(tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank has to be an integer of at least 1.*: 0"),
        (dict(rank=2.0), "rank has to be"),
        (dict(rank=2, alpha=0), "alpha has to be a number above 0"),
        (dict(rank=2, alpha="2"), "alpha has to be"),
        (dict(rank=2, targets="query"), "targets have to be 'all' or some"),
        (dict(rank=2, targets=()), "targets have to be"),
        (dict(rank=2, targets=("q_proj",)), "targets have to be.*q_proj"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_options_in_one_form():
    assert Lora(4) == Lora(4, 8, ["value", "query"])
    assert Lora(4, targets=ROLES[::-1]).targets == ROLES


def test_what_cannot_be_adapted():
    from keras_hub import models

    backbone = make_causal_lm(num_layers=1).backbone
    add_lora(backbone, Lora(2))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(backbone, Lora(2))
    gpt2 = models.GPT2Backbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
    )
    trained = len(gpt2.trainable_variables)
    for targets, message in (
        (("query", "gate"), r"no layers for \['gate'\]"),
        (("up",), "isn't a product with one matrix.*'up'"),  # an activation
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(gpt2, Lora(2, targets=targets))
    assert len(gpt2.trainable_variables) == trained  # unchanged
    add_lora(gpt2, Lora(2, targets=("query", "output")))
    assert len(gpt2.trainable_variables) == 4
    mixture = models.MixtralBackbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
        num_experts=2,
        top_k=1,
    )
    with pytest.raises(ValueError, match="'all' can't adapt .*no layer out of"):
        add_lora(mixture, Lora(2, targets="all"))
    with pytest.raises(ValueError, match="Received: Sequential"):
        add_lora(keras.Sequential(), Lora(2))


def test_lora_of_keras_is_refused(tmp_path):
    causal_lm = make_causal_lm(num_layers=1)
    model = keras_iris.SelfPlayModel(causal_lm)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    causal_lm.backbone.enable_lora(2)
    for use in (
        lambda: model.compile("sgd", keras_iris.losses.IRIS()),
        lambda: model.save_weights(tmp_path / "lora.weights.h5"),
        lambda: model.load_weights(path),
        lambda: keras_iris.export(causal_lm, tmp_path / "export"),
    ):
        with pytest.raises(ValueError, match="`enable_lora` isn't taken"):
            use()
