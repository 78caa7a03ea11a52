"""What a model refuses by name, and what Keras' own ways keep."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from programs import environment
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.data import Example, PairDataset
from keras_iris.losses import IRIS

optimizers = keras.optimizers
PAIRS, OPPONENT = make_pairs(), np.full((8, 2), -20.0, "float32")
name = keras.backend.backend()


def _model(dtype="float32", **options):
    causal_lm = make_causal_lm(num_layers=1, dtype=dtype)
    model = keras_iris.SelfPlayModel(causal_lm)
    if options:
        model.compile(**options)
    return model


STUCK = {
    "adam": lambda: optimizers.Adam(1e-3),
    "rmsprop": lambda: optimizers.RMSprop(5e-7),
    "wrapped": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(1e-3)),
    "muon": lambda: optimizers.Muon(1e-5),
    "lion": lambda: optimizers.Lion(1e-6),
    "schedule": lambda: optimizers.RMSprop(
        optimizers.schedules.CosineDecay(0.0, 100, 0, "c", 1e-6, 10)
    ),
}
MOVING = {
    "adam": lambda: optimizers.Adam(1e-3, beta_2=0.99),
    "rmsprop": lambda: optimizers.RMSprop(1e-3),
    "sgd": lambda: optimizers.SGD(0.01, gradient_accumulation_steps=4),
    "lion": lambda: optimizers.Lion(1e-3),
    "schedule": lambda: optimizers.RMSprop(
        optimizers.schedules.CosineDecay(0.0, 100, 0, "c", 1e-3, 10)
    ),
}


@pytest.mark.parametrize("case", STUCK)
def test_optimizers_that_cannot_move_bfloat16(case):
    model = _model("bfloat16")
    with pytest.raises(ValueError, match="moves no bfloat16.*mixed_bfloat16"):
        model.compile(STUCK[case](), IRIS())


@pytest.mark.parametrize("case", MOVING)
def test_optimizers_that_can(case):
    _model("bfloat16").compile(MOVING[case](), IRIS())


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_small_rates_in_float32_variables(dtype):
    _model(dtype).compile(optimizers.AdamW(5e-7), IRIS())


def test_whole_models_keep_how_they_were_compiled(tmp_path):
    options = {
        "jit_compile": False,
        "run_eagerly": True,
        "auto_scale_loss": False,
        "steps_per_execution": 1 if name == "torch" else 3,
        "micro_batch_size": 5,
    }
    model = _model(
        optimizer=optimizers.Adam(0.01),
        loss=IRIS(1.5),
        metrics=["mse", keras_iris.metrics.Margin()],
        **options,
    )
    model.train_on_batch(PAIRS, OPPONENT)
    model.save(tmp_path / "model.keras")
    other = keras.saving.load_model(tmp_path / "model.keras")
    for option, value in options.items():
        if option != "auto_scale_loss":
            assert getattr(other, option) == value, option
    assert other.get_compile_config() == model.get_compile_config()
    assert other.get_compile_config()["auto_scale_loss"] is False
    assert float(other.alpha.value) == 1.5
    for variable, expected in zip(
        other.optimizer.variables, model.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy())
    assert model.train_on_batch(PAIRS, OPPONENT) == pytest.approx(
        other.train_on_batch(PAIRS, OPPONENT)
    )


def test_class_weight():
    model = _model(optimizer="sgd", loss=IRIS())
    for method in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="`sample_weight`"):
            method(PAIRS, OPPONENT, class_weight={0: 1.0, 1: 2.0})


@pytest.mark.parametrize("size", [None, 2])
def test_no_loss(size):
    model = _model(optimizer="sgd", micro_batch_size=size)
    for method in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match="compiled without a loss"):
            method(PAIRS, OPPONENT)


def test_functional_use():
    model = _model()
    inputs = {
        name: keras.Input((2, None), dtype=array.dtype.name, name=name)
        for name, array in PAIRS.items()
    }
    log_probs = model(inputs)
    assert log_probs.shape == (None, 2)
    margin = keras.layers.Lambda(lambda x: x[:, 0] - x[:, 1], output_shape=())(
        log_probs
    )
    expected = model.predict(PAIRS, verbose=0)
    actual = keras.Model(inputs, margin).predict(PAIRS, verbose=0)
    np.testing.assert_allclose(
        np.ravel(actual), expected[:, 0] - expected[:, 1], atol=1e-4
    )


DISTRIBUTED = """
import keras, numpy as np, pytest
import keras_iris
from tiny_models import make_causal_lm, make_pairs

pairs, opponent = make_pairs(), np.zeros((8, 2), "float32")
"""
STRATEGY = """
import tensorflow as tf
devices = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(devices[0], two)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    with pytest.raises(ValueError, match="2 replicas need MirroredStrategy"):
        model.compile("sgd", keras_iris.losses.IRIS(), micro_batch_size=3)
    model.compile("sgd", keras_iris.losses.IRIS(), micro_batch_size=4)
"""
PARALLEL = """
mesh = keras.distribution.DeviceMesh((2,), ["batch"], ["cpu:0", "cpu:1"])
model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
model.compile("sgd", keras_iris.losses.IRIS())
keras.distribution.set_distribution(
    keras.distribution.DataParallel(device_mesh=mesh)
)
with pytest.raises(ValueError, match="DataParallel needs JAX"):
    model.fit(pairs, opponent)
with pytest.raises(ValueError, match="DataParallel needs JAX"):
    model.compile("sgd", keras_iris.losses.IRIS())
"""
INDIVISIBLE = """
keras.distribution.set_distribution(keras.distribution.DataParallel())
model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
model.compile("sgd", keras_iris.losses.IRIS())
for call in (
    lambda: model.fit(pairs, opponent, batch_size=3),
    lambda: model.evaluate(pairs, opponent, batch_size=6),
    lambda: model.predict({k: v[:7] for k, v in pairs.items()}),
    lambda: model.train_on_batch(
        {k: v[:7] for k, v in pairs.items()}, opponent[:7]
    ),
):
    with pytest.raises(ValueError, match="4 devices .* have to divide"):
        call()
model.fit(pairs, opponent, batch_size=4)
"""


@pytest.mark.parametrize(
    ("backends", "program"),
    [
        (("tensorflow",), STRATEGY),
        (("torch",), PARALLEL),
        (("jax",), INDIVISIBLE),
    ],
    ids=["strategy", "parallel", "indivisible"],
)
def test_distributions(backends, program, request):
    if name not in backends:
        pytest.skip(f"of {backends}")
    result = subprocess.run(
        [sys.executable, "-c", DISTRIBUTED + program],
        env=environment(num_devices=4),
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(name != "tensorflow", reason="TensorFlow's")
def test_import_leaves_grappler_as_it_is():
    program = (
        "import keras_iris, tensorflow as tf; "
        "print(tf.config.optimizer.get_experimental_options())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert "dependency_optimization" not in result.stdout
    assert result.returncode == 0, result.stderr


def test_nothing_to_train():
    model = _model(optimizer="sgd", loss=IRIS())
    model.causal_lm.backbone.trainable = False
    model.compile(optimizer="sgd", loss=IRIS())
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match="Nothing of the model is train"):
            train(PAIRS, OPPONENT)


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_ids_that_the_model_does_not_have(wrong):
    """JAX gave log-probs of plus infinity."""
    model = _model(optimizer="sgd", loss=IRIS())
    ids = PAIRS["token_ids"].copy()
    ids[3, 1, 2] = wrong
    pairs = PAIRS | {"token_ids": ids}
    examples = [Example(np.array([5, 6]), np.array([7]))] * 8
    dataset = PairDataset(examples, [np.array([wrong])] * 8, batch_size=8)
    error = f"Vocabulary mismatch: .* has the token id {wrong}, expected ids"
    for use in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match=error):
            use(pairs, OPPONENT)
    for use in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match=error):
            use(dataset)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_that_is_quantized_later():
    """Its table isn't the embeddings any more."""
    model = _model()
    model.causal_lm.quantize("int8")
    with pytest.raises(ValueError, match="output layer .* in float"):
        model.predict(PAIRS, verbose=0)


@pytest.mark.parametrize("make", [np.asarray, list, keras.ops.array])
def test_negative_weights(make):
    model = _model(optimizer="sgd", loss=IRIS())
    weight = make(np.array([1, 1, -1, 1, 1, 1, 1, 1], "float32"))
    data = (PAIRS, OPPONENT, weight)
    for call in (
        lambda: model.fit(PAIRS, OPPONENT, sample_weight=weight),
        lambda: model.fit(PAIRS, OPPONENT, validation_data=data),
        lambda: model.evaluate(*data[:2], sample_weight=weight),
        lambda: model.test_on_batch(*data),
        lambda: model.train_on_batch(*data),
    ):
        with pytest.raises(ValueError, match="0 or above.*-1.0 among"):
            call()


def test_weights_in_both_forms():
    model = _model(optimizer=keras.optimizers.SGD(0.0), loss=IRIS())
    weight = np.arange(1, 9, dtype="float32")
    losses = [
        model.evaluate(
            PAIRS, OPPONENT, sample_weight=w, batch_size=size, verbose=0
        )
        for w in (weight, weight[:, None])
        for size in (8, 5, 8)
    ]
    assert losses[:3] == losses[3:]
