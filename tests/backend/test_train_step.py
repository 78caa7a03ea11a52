"""The exact gradient of the whole batch, from micro-batches of any size."""

import functools

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.losses import (
    IRIS,
    SFT,
    SPACE,
    SPIF,
    SPIN,
    TSPIN,
    Risk,
    SelfPlayLoss,
)

RELATIVE_TOLERANCE = 1e-5  # float32, in the norm of each variable's change


class TiltedMargin(SelfPlayLoss):
    """Two risks that are neither additive nor separable."""

    def risks(self, y_true, y_pred):
        log_ratio = y_pred - y_true
        margin = log_ratio[:, 0] - log_ratio[:, 1]
        return [
            Risk(keras.ops.softplus(-margin), 2.0, weight=0.5),
            Risk(keras.ops.square(margin), -0.1),
        ]


OBJECTIVES = {
    "iris": IRIS,
    "tilted margin": lambda: TiltedMargin("tilted_margin"),
    "spin": lambda: SPIN(beta=1.0),
    "space": lambda: SPACE(mu=1.0),
    "spif": lambda: SPIF(c=1.0),
    "sft": SFT,
    "anchored iris": lambda: IRIS(sft_weight=0.5),
    "anchored tspin": lambda: TSPIN(0.2, 0.7, sft_weight=0.5),
}


# Log-probs near those of the random model, about -3.6 nats a token.
PAIRS = make_pairs(batch_size=8)
# With a third response to the prompt: the one of another row.
TRIPLES = {k: v[:, [0, 1, 1]].copy() for k, v in PAIRS.items()}
for _tensor in TRIPLES.values():
    _tensor[:, 2] = np.roll(_tensor[:, 1], 1, axis=0)


def _opponent(inputs):
    return -3.6 * inputs["response_mask"].sum(-1).astype("float32")


OPPONENT = _opponent(PAIRS)


def make_model(**options):
    return keras_iris.SelfPlayModel(make_causal_lm(num_layers=1, **options))


@functools.cache
def _compiled(objective, micro_batch_size, **options):
    """A model, and the values that its variables start with."""
    model = make_model()
    clipnorm = options.pop("clipnorm", None)
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, clipnorm=clipnorm),
        loss=OBJECTIVES[objective](),
        micro_batch_size=micro_batch_size,
        metrics=keras_iris.metrics.self_play_metrics(),
        **options,
    )
    model.optimizer.build(model.trainable_variables)
    return model, [v.numpy() for v in model.variables]


def _train(objective, micro_batch_size, *, alpha=1.0, weight=None, **options):
    """Changes of the weights in 3 steps, and the logs of each."""
    model, start = _compiled(objective, micro_batch_size, **options)
    for variable, value in zip(model.variables, start, strict=True):
        variable.assign(value)
    model.alpha.assign(alpha)
    before = [v.numpy() for v in model.trainable_variables]
    inputs = TRIPLES if model.loss.max_responses == 3 else PAIRS
    opponent = _opponent(inputs)
    logs = [
        model.train_on_batch(
            inputs, opponent, sample_weight=weight, return_dict=True
        )
        for _ in range(3)
    ]
    changes = [
        v.numpy() - b
        for v, b in zip(model.trainable_variables, before, strict=True)
    ]
    return changes, logs


def _largest_difference(changes, expected):
    scale = np.sqrt(sum(np.sum(e.astype("float64") ** 2) for e in expected))
    return max(
        np.linalg.norm(c - e) / scale
        for c, e in zip(changes, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("objective", "alpha"),
    [("iris", 0.5), ("iris", 2.0), *((name, 1.0) for name in OBJECTIVES)],
)
def test_micro_batches_train_as_the_whole_batch(objective, alpha):
    expected, expected_logs = _train(objective, None, alpha=alpha)
    # The exponential of a difference of log-probs has the rounding of these.
    tolerance = RELATIVE_TOLERANCE * (3 if objective == "tilted margin" else 1)
    for size in (1, 3) if (objective, alpha) == ("iris", 2.0) else (3,):
        changes, logs = _train(objective, size, alpha=alpha)
        assert _largest_difference(changes, expected) < tolerance
        for log, expected_log in zip(logs, expected_logs, strict=True):
            for key, value in expected_log.items():
                np.testing.assert_allclose(
                    log[key], value, rtol=1e-4, atol=1e-5, err_msg=key
                )


@pytest.mark.parametrize("size", [None, 3])
def test_gradient_norm_is_that_of_the_batch_before_clipping(size):
    changes = {}
    rate = 1e-3
    model = make_model()
    start = [v.numpy() for v in model.trainable_variables]
    optimizers = {
        "plain": keras.optimizers.SGD(rate),
        "clipped": keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(rate, global_clipnorm=0.1)
        ),
    }
    for name, optimizer in optimizers.items():
        for variable, value in zip(
            model.trainable_variables, start, strict=True
        ):
            variable.assign(value)
        model.compile(
            optimizer,
            IRIS(),
            micro_batch_size=size,
            metrics=[keras_iris.metrics.GradientNorm()],
        )
        logs = model.train_on_batch(PAIRS, OPPONENT, return_dict=True)
        squares = [
            np.sum((v.numpy().astype("float64") - s) ** 2)
            for v, s in zip(model.trainable_variables, start, strict=True)
        ]
        changes[name] = np.sqrt(sum(squares)) / rate
        # Of SGD's first step the norm is known from the weights.
        expected = changes["plain"]
        assert float(logs["gradient_norm"]) == pytest.approx(expected, 1e-3)
        latest = model.recent.latest().gradient_norm
        assert latest == pytest.approx(expected, 1e-3)
    assert changes["clipped"] == pytest.approx(0.1, 1e-2)


def _float32(variables):
    return [
        keras.ops.convert_to_numpy(keras.ops.cast(v.value, "float32"))
        for v in variables
    ]


def test_half_precision_gradients_are_summed_in_float32():
    """Of many equal pairs the gradient is that of one."""
    num_copies = 256
    model = make_model(dtype="bfloat16")
    start = _float32(model.trainable_variables)

    def change(num_rows, size):
        for variable, value in zip(
            model.trainable_variables, start, strict=True
        ):
            variable.assign(value)
        model.compile(
            optimizer=keras.optimizers.SGD(10.0),
            loss=SFT(),
            micro_batch_size=size,
        )
        x = {k: np.repeat(v[:1], num_rows, axis=0) for k, v in PAIRS.items()}
        y = np.repeat(OPPONENT[:1], num_rows, axis=0)
        model.train_on_batch(x, y)
        end = _float32(model.trainable_variables)
        return [e - s for e, s in zip(end, start, strict=True)]

    difference = _largest_difference(change(num_copies, 1), change(1, None))
    assert difference < 0.02  # bfloat16 has 8 bits; summed in it, 0.3


def test_averaged_micro_batch_losses_fail_that_check():
    """A test of the test: naive accumulation is told apart."""
    expected, _ = _train("iris", None, alpha=2.0)
    model = make_model()
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=2),
        loss=IRIS(alpha=2.0),
    )
    before = [v.numpy() for v in model.trainable_variables]
    for _ in range(3):
        for rows in (slice(0, 4), slice(4, 8)):
            part = {k: v[rows] for k, v in PAIRS.items()}
            model.train_on_batch(part, OPPONENT[rows])
    changes = [
        v.numpy() - b
        for v, b in zip(model.trainable_variables, before, strict=True)
    ]
    assert _largest_difference(changes, expected) > 100 * RELATIVE_TOLERANCE


# As a column and in NumPy's own dtype, as Keras passes them on, too.
@pytest.mark.parametrize(
    ("objective", "shape", "dtype"),
    [("iris", (8, 1), "float64"), ("spin", (8,), "float32")],
)
def test_sample_weights_and_clipping(objective, shape, dtype):
    weight = np.array([1, 2, 0, 1, 1, 0.5, 1, 3], "float32")
    options = {"alpha": 2.0, "clipnorm": 0.5}
    expected, _ = _train(objective, None, weight=weight, **options)
    received = weight.reshape(shape).astype(dtype)
    changes, _ = _train(objective, 3, weight=received, **options)
    assert _largest_difference(changes, expected) < RELATIVE_TOLERANCE
    with pytest.raises(ValueError, match="one weight per pair"):
        _train(objective, 3, weight=np.ones((8, 2), "float32"))


def test_integer_weights():
    weight = np.array([1, 2, 0, 1, 1, 4, 1, 3])
    expected, _ = _train("iris", None, weight=weight.astype("float32"))
    changes, _ = _train("iris", 3, weight=weight)
    assert _largest_difference(changes, expected) < RELATIVE_TOLERANCE


def test_run_eagerly():
    expected, _ = _train("iris", None, alpha=2.0)
    changes, _ = _train("iris", 5, alpha=2.0, run_eagerly=True)
    assert _largest_difference(changes, expected) < RELATIVE_TOLERANCE


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="torch.compile takes minutes"
)
def test_jit_compile():
    expected, _ = _train("iris", None, alpha=2.0)
    for size in (None, 3):
        changes, _ = _train("iris", size, alpha=2.0, jit_compile=True)
        assert _largest_difference(changes, expected) < RELATIVE_TOLERANCE


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras has no steps_per_execution on PyTorch",
)
def test_steps_per_execution():
    def train(**options):
        model = make_model()
        model.compile(
            optimizer=keras.optimizers.SGD(0.01), loss=IRIS(2.0), **options
        )
        model.fit(PAIRS, OPPONENT, batch_size=2, shuffle=False, verbose=0)
        return [v.numpy() for v in model.trainable_variables]

    expected = train()
    for options in (
        {"steps_per_execution": 2},
        {"steps_per_execution": 2, "micro_batch_size": 1},
    ):
        for value, other in zip(train(**options), expected, strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="others have no graph"
)
def test_terms_run_one_after_another():
    # Else the activations of two micro-batches are held.
    import tensorflow as tf

    model, _ = _compiled("iris", 2)
    data = keras.tree.map_structure(tf.constant, (PAIRS, OPPONENT))
    step = tf.function(model.train_step).get_concrete_function(data)
    loops = [op for op in step.graph.get_operations() if "While" in op.type]
    assert len(loops) == 2
    needed, seen = [loops[1]], set()
    while needed:
        operation = needed.pop()
        if operation.name not in seen:
            seen.add(operation.name)
            needed += [tensor.op for tensor in operation.inputs]
            needed += operation.control_inputs
    assert loops[0].name in seen


def test_dropout_is_new_in_every_micro_batch_and_step():
    model = make_model(architecture="mistral", dropout=0.5)
    model.compile(
        optimizer=keras.optimizers.SGD(0.0), loss=SFT(), micro_batch_size=2
    )
    same = {k: np.repeat(v[:1], 8, axis=0) for k, v in PAIRS.items()}
    seen = []
    for _ in range(2):
        model.train_on_batch(same, np.repeat(OPPONENT[:1], 8, axis=0))
        seen.append(model.recent.latest().policy[:, 0])
    assert len(np.unique(np.concatenate(seen).round(4))) == 16


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_reduced_precision(dtype):
    if dtype == "mixed_float16" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 attention on the CPU")
    model = make_model(dtype=dtype)
    model.compile(
        optimizer=keras.optimizers.SGD(0.05),
        loss=IRIS(alpha=1.0),
        micro_batch_size=3,
    )
    is_scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (dtype == "mixed_float16")
    losses = [model.train_on_batch(PAIRS, OPPONENT) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.01
