"""Folded products are the same products, over one axis of rows."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("of JAX only", allow_module_level=True)

import jax
import jax.numpy as jnp

from keras_iris.backend.jax_products import fold_products

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


def gradient(function):
    def loss(*arguments):
        return function(*arguments)["loss"]

    return jax.grad(loss)


def assert_close(actual, expected):
    tolerance = 1e-6 * np.abs(expected).max()  # float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=tolerance)


def test_same_values_and_gradients():
    arguments = make_arguments()
    folded = fold_products(layer)
    for expected, actual in (
        (layer(*arguments), jax.jit(folded)(*arguments)),
        (gradient(layer)(*arguments), gradient(folded)(*arguments)),
    ):
        jax.tree.map(assert_close, actual, expected)


def test_gradients_of_kernels_sum_over_one_axis():
    def count_sums_over_rows(function):
        jaxpr = jax.make_jaxpr(gradient(function))(*make_arguments())
        return sum(
            {ROWS, TIME} <= {equation.invars[0].aval.shape[a] for a in axes}
            for equation in jaxpr.eqns
            if equation.primitive is jax.lax.dot_general_p
            for axes in [equation.params["dimension_numbers"][0][0]]
        )

    assert count_sums_over_rows(layer) == 4
    assert count_sums_over_rows(fold_products(layer)) == 0
