"""Folded products are the same products, over one axis of rows."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("of JAX only", allow_module_level=True)

import jax
import jax.numpy as jnp
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.backend.jax_products import fold_products
from keras_iris.models.remat import remat_layers

ROWS, TIME, WIDTH, HEADS, SIZE = 3, 5, 8, 2, 4


def layer(kernels, inputs):
    """Products with one, two and no contracted axes, and one of a batch."""
    hidden = inputs["hidden"] @ kernels["dense"]
    query = jnp.einsum("btm,mhk->bthk", jax.nn.silu(hidden), kernels["query"])
    scores = jnp.einsum("bthk,bshk->bhts", query, query)
    output = jnp.einsum("bthk,hkm->btm", query, kernels["output"])
    outer = jnp.tensordot(inputs["hidden"], kernels["bias"], axes=0)
    return {"loss": (output**2).sum() + scores.sum() + outer.sum(), "one": 1.0}


def make_arguments():
    rng = np.random.default_rng(0)
    shapes = {
        "dense": (WIDTH, WIDTH),
        "query": (WIDTH, HEADS, SIZE),
        "output": (HEADS, SIZE, WIDTH),
        "bias": (2,),
    }
    kernels = {
        name: rng.standard_normal(shape, "float32")
        for name, shape in shapes.items()
    }
    hidden = rng.standard_normal((ROWS, TIME, WIDTH), "float32")
    return kernels, {"hidden": hidden}


def loss_of(function):
    return lambda *arguments: function(*arguments)["loss"]


def assert_close(actual, expected):
    tolerance = 1e-6 * np.abs(expected).max()  # float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=tolerance)


def test_same_values_and_gradients():
    arguments = make_arguments()
    folded = fold_products(layer)
    for expected, actual in (
        (layer(*arguments), jax.jit(folded)(*arguments)),
        (
            jax.grad(loss_of(layer))(*arguments),
            jax.grad(loss_of(folded))(*arguments),
        ),
    ):
        jax.tree.map(assert_close, actual, expected)


def count_sums_over_two_axes(function, *arguments):
    """Products of a gradient that sum over two axes or more."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive is jax.lax.dot_general_p:
                (axes, _), _ = equation.params["dimension_numbers"]
                total += len(axes) > 1
            for inner in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    total += count(getattr(inner, "jaxpr", inner))
        return total

    def is_jaxpr(value):
        return hasattr(value, "eqns")

    return count(jax.make_jaxpr(jax.grad(function))(*arguments))


def test_gradients_of_kernels_sum_over_one_axis():
    arguments = make_arguments()
    own = count_sums_over_two_axes(loss_of(layer), *arguments)
    folded = count_sums_over_two_axes(loss_of(fold_products(layer)), *arguments)
    # Those over heads and their widths stay.
    assert own - folded == len(arguments[0])


@pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="products are folded on a CPU",
)
@pytest.mark.parametrize("remat", [False, True])
def test_model_trains_with_folded_products(monkeypatch, remat):
    causal_lm = make_causal_lm(num_layers=1)
    if remat:
        remat_layers(causal_lm.backbone)
    model = keras_iris.SelfPlayModel(causal_lm)
    trainable, fixed = (
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
        )
    )

    def loss(trainable):
        y_pred, _ = model.stateless_call(
            trainable, fixed, make_pairs(), training=True
        )
        return y_pred.sum()

    folded = count_sums_over_two_axes(loss, trainable)
    monkeypatch.setattr(keras_iris.backend.jax, "fold_products", lambda f: f)
    own = count_sums_over_two_axes(loss, trainable)
    # Three kernels of attention, its output's, three of the dense layers.
    assert own - folded >= 7


def test_eager_steps_and_predictions_are_not_traced_again(monkeypatch):
    monkeypatch.delattr(keras_iris.backend.jax, "fold_products")
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    batch = make_pairs(), np.zeros((8, 2), "float32")
    model.compile(loss=keras_iris.losses.SFT(), run_eagerly=True)
    model.train_on_batch(*batch)
    model.compile(loss=keras_iris.losses.SFT())
    model.predict_on_batch(batch[0])
    model.test_on_batch(*batch)


def test_variables_as_arguments():
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    y_pred, _ = model.stateless_call(
        model.trainable_variables,
        model.non_trainable_variables,
        make_pairs(),
        training=True,
    )
    expected = model.predict(make_pairs(), verbose=0)
    np.testing.assert_allclose(y_pred, expected, rtol=1e-5)
