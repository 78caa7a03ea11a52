"""The only folder that knows which backend Keras runs on.

Each module offers the same three names: `Trainer`, the base of
`SelfPlayModel` with its train step, `sum_chunks`, a sum over chunks that keeps
the activations of one chunk, and `dataset`, what `fit` takes for batches.
"""

# mypy: disable-error-code="assignment"

import keras

match keras.backend.backend():
    case "jax":
        from keras_iris.backend.jax import Trainer, dataset, sum_chunks
    case "tensorflow":
        from keras_iris.backend.tensorflow import Trainer, dataset, sum_chunks
    case "torch":
        from keras_iris.backend.torch import Trainer, dataset, sum_chunks
    case name:
        raise ImportError(
            "keras_iris trains on JAX, TensorFlow and PyTorch; Keras runs on "
            f"{name!r}. Set KERAS_BACKEND to 'jax', 'tensorflow' or 'torch'."
        )

__all__ = ["Trainer", "dataset", "sum_chunks"]
