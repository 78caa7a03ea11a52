"""The only folder that knows which backend Keras runs on.

Each backend offers the same names: `Trainer`, the base of `SelfPlayModel` with
its train step, `map_parts`, a function of a batch's parts, `head_log_probs`,
log-probs from hidden states, `write`, which puts keys and values into a cache,
`dataset`, what `fit` takes for batches, `seed_step`, which seeds a step's
random numbers where no variable of the model does, `cache_compilations`, which
keeps compiled programs on disk, `is_on_cpu`, which tells
where tensors are, and `prepare_remat`, what has to be done before layers are
rematerialised. Of several processes: `start_processes`, `process_count` and
`process_index`, `exchange` of texts, `read` and `cut`, arrays from and to the
devices of all, `num_batch_shares`, parts of a batch, and `IS_ONE_PROGRAM`,
whether they compute together or each on its own.
"""

# mypy: disable-error-code="assignment"

import keras

# Has no public name (Keras 3.15).
from keras.src.backend import AutocastScope

from keras_iris.backend.head import HeadOptions
from keras_iris.backend.refusals import count_layer_losses, refuse_layer_losses

match keras.backend.backend():
    case "jax":
        from keras_iris.backend.jax import (
            Trainer,
            cache_compilations,
            dataset,
            device_names,
            is_on_cpu,
            map_parts,
            prepare_remat,
            seed_step,
            write,
        )
        from keras_iris.backend.jax_checkpoint import ShardedCheckpoints
        from keras_iris.backend.jax_head import head_log_probs
        from keras_iris.backend.jax_processes import (
            IS_ONE_PROGRAM,
            cut,
            exchange,
            is_cut,
            num_batch_shares,
            process_count,
            process_index,
            read,
            start_processes,
        )
    case "tensorflow":
        from keras_iris.backend.refusals import (
            refuse_sharded_checkpoints as ShardedCheckpoints,
        )
        from keras_iris.backend.tensorflow import (
            Trainer,
            cache_compilations,
            dataset,
            device_names,
            is_on_cpu,
            map_parts,
            prepare_remat,
            seed_step,
            write,
        )
        from keras_iris.backend.tensorflow_head import head_log_probs
        from keras_iris.backend.tensorflow_processes import (
            IS_ONE_PROGRAM,
            cut,
            exchange,
            is_cut,
            num_batch_shares,
            process_count,
            process_index,
            read,
            start_processes,
        )
    case "torch":
        from keras_iris.backend.refusals import (
            refuse_sharded_checkpoints as ShardedCheckpoints,
        )
        from keras_iris.backend.torch import (
            Trainer,
            cache_compilations,
            dataset,
            device_names,
            is_on_cpu,
            map_parts,
            prepare_remat,
            seed_step,
            write,
        )
        from keras_iris.backend.torch_head import head_log_probs
        from keras_iris.backend.torch_processes import (
            IS_ONE_PROGRAM,
            cut,
            exchange,
            is_cut,
            num_batch_shares,
            process_count,
            process_index,
            read,
            start_processes,
        )
    case name:
        raise ImportError(
            "keras_iris trains on JAX, TensorFlow and PyTorch; Keras runs on "
            f"{name!r}. Set KERAS_BACKEND to 'jax', 'tensorflow' or 'torch'."
        )

__all__ = [
    "IS_ONE_PROGRAM",
    "AutocastScope",
    "HeadOptions",
    "ShardedCheckpoints",
    "Trainer",
    "cache_compilations",
    "count_layer_losses",
    "cut",
    "dataset",
    "device_names",
    "exchange",
    "head_log_probs",
    "is_cut",
    "is_on_cpu",
    "map_parts",
    "num_batch_shares",
    "prepare_remat",
    "process_count",
    "process_index",
    "read",
    "refuse_layer_losses",
    "seed_step",
    "start_processes",
    "write",
]
