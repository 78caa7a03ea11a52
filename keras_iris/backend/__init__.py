"""The only folder that knows which backend Keras runs on.

Each module offers the same three names: `Trainer`, the mix-in with the train
step of `SelfPlayModel`; `sum_chunks`, a sum over chunks that keeps the
activations of one chunk; and `inference`, a context in
which nothing is recorded for a backward pass.
"""

import keras

match keras.backend.backend():
    case "jax":
        from keras_iris.backend.jax import Trainer, inference, sum_chunks
    case "tensorflow":
        from keras_iris.backend.tensorflow import (
            Trainer,
            inference,
            sum_chunks,
        )
    case "torch":
        from keras_iris.backend.torch import Trainer, inference, sum_chunks
    case name:
        raise ImportError(
            "keras_iris trains on JAX, TensorFlow and PyTorch; Keras runs on "
            f"{name!r}. Set KERAS_BACKEND to 'jax', 'tensorflow' or 'torch'."
        )

__all__ = ["Trainer", "inference", "sum_chunks"]
