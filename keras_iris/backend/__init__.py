"""The only folder that knows which backend Keras runs on.

Each module offers the same five names: `Trainer`, the base of
`SelfPlayModel` with its train step, `sum_chunks`, a sum over chunks that keeps
the activations of one chunk, `token_log_probs`, log-probs from logits in few
passes over them, `dataset`, what `fit` takes for batches, and `seed_step`,
which seeds a step's random numbers where no variable of the model does.
"""

# mypy: disable-error-code="assignment"

import keras

match keras.backend.backend():
    case "jax":
        from keras_iris.backend.jax import (
            Trainer,
            dataset,
            seed_step,
            sum_chunks,
            token_log_probs,
        )
    case "tensorflow":
        from keras_iris.backend.tensorflow import (
            Trainer,
            dataset,
            seed_step,
            sum_chunks,
            token_log_probs,
        )
    case "torch":
        from keras_iris.backend.torch import (
            Trainer,
            dataset,
            seed_step,
            sum_chunks,
            token_log_probs,
        )
    case name:
        raise ImportError(
            "keras_iris trains on JAX, TensorFlow and PyTorch; Keras runs on "
            f"{name!r}. Set KERAS_BACKEND to 'jax', 'tensorflow' or 'torch'."
        )

__all__ = ["Trainer", "dataset", "seed_step", "sum_chunks", "token_log_probs"]
