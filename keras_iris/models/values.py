"""The values of a model's variables: whether they are finite, their hash."""

from collections.abc import Iterable

import keras
import numpy as np
import xxhash

from keras_iris import backend
from keras_iris.files import as_bytes


def hash_variables(variables: Iterable[keras.Variable]) -> str:
    """A hash of variables' values, which have to be finite."""
    digest = xxhash.xxh3_128()
    for variable in variables:
        digest.update(as_bytes(finite(variable)))
    return digest.hexdigest()[:16]


def finite(variable: keras.Variable) -> np.ndarray:
    """The values of a variable; an error if training has broken them."""
    value = backend.read(variable)
    if not np.isfinite(value).all():
        raise _not_finite(variable)
    return value


def check_finite(variable: keras.Variable) -> None:
    """As `finite`, on the devices."""
    value = variable.value
    if not backend.read(keras.ops.all(keras.ops.isfinite(value))):
        raise _not_finite(variable)


def _not_finite(variable: keras.Variable) -> FloatingPointError:
    return FloatingPointError(
        f"{variable.path} is not finite. What is on disk is older. Load "
        "the model again if it is new; else lower the learning rate, clip "
        "gradients, or use a wider dtype."
    )
