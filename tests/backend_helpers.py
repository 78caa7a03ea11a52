"""What tests need of a backend."""

import contextlib

import keras
import numpy as np


def gradient(function, x):
    """Gradient of a scalar function at an array, as an array."""
    match keras.backend.backend():
        case "jax":
            import jax

            return np.asarray(jax.grad(function)(np.asarray(x)))
        case "torch":
            import torch

            x = keras.ops.convert_to_tensor(np.array(x)).requires_grad_()
            return torch.autograd.grad(function(x), x)[0].cpu().numpy()
        case _:
            import tensorflow as tf

            x = tf.convert_to_tensor(np.asarray(x))
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = function(x)
            return tf.convert_to_tensor(tape.gradient(value, x)).numpy()


@contextlib.contextmanager
def precision(dtype):
    """Keras' float type, "float32" or "float64", while the context lasts."""
    before = keras.config.floatx()
    is_wide_jax = keras.backend.backend() == "jax" and dtype == "float64"
    keras.config.set_floatx(dtype)
    try:
        with _jax_x64() if is_wide_jax else contextlib.nullcontext():
            yield
    finally:
        keras.config.set_floatx(before)


def _jax_x64():
    import jax

    return jax.enable_x64(True)
