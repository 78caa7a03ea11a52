"""The only folder that knows which backend Keras runs on.

Each backend offers the same names: `Trainer`, the base of `SelfPlayModel` with
its train step, `map_parts`, a function of a batch's parts, `head_log_probs`,
log-probs from hidden states, `write`, which puts keys and values into a cache,
`write_rows`, which gives an array other rows, `dataset`, what `fit` takes for
batches, `seed_step`, which seeds a step's random numbers where no variable of
the model does, `cache_compilations`, which keeps compiled programs on disk,
`is_on_cpu`, which tells where tensors are, `remat`, a function that the
backward pass calls again, and `prepare_remat`, what has to be done before
layers are.

Of several processes: `start_processes`, `process_count` and `process_index`,
`exchange` of texts, where each computes on its own of any values, `read` and
`cut`, arrays from and to the devices of all, `num_batch_shares`, parts of a
batch, `free_bytes`, memory that is free on a device, `IS_ONE_PROGRAM`, whether
they compute together or each on its own, `num_row_shares`, parts of a forward
pass' rows, `is_cut`, whether variables are cut over devices, and
`sharded_checkpoints`, which writes such variables.
"""

# mypy: disable-error-code="no-redef"

import keras

# Has no public name (Keras 3.15).
from keras.src.backend import AutocastScope

from keras_iris.backend.head import HeadOptions
from keras_iris.backend.refusals import count_layer_losses, refuse_layer_losses

match keras.backend.backend():
    case "jax":
        from keras_iris.backend import jax as _step
        from keras_iris.backend import jax_head as _head
        from keras_iris.backend import jax_processes as _processes
    case "tensorflow":
        from keras_iris.backend import tensorflow as _step
        from keras_iris.backend import tensorflow_head as _head
        from keras_iris.backend import tensorflow_processes as _processes
    case "torch":
        from keras_iris.backend import torch as _step
        from keras_iris.backend import torch_head as _head
        from keras_iris.backend import torch_processes as _processes
    case name:
        raise ImportError(
            "keras_iris trains on JAX, TensorFlow and PyTorch; Keras runs on "
            f"{name!r}. Set KERAS_BACKEND to 'jax', 'tensorflow' or 'torch'."
        )

Trainer = _step.Trainer
cache_compilations = _step.cache_compilations
dataset = _step.dataset
device_names = _step.device_names
is_on_cpu = _step.is_on_cpu
map_parts = _step.map_parts
prepare_remat = _step.prepare_remat
remat = _step.remat
seed_step = _step.seed_step
write = _step.write
write_rows = _step.write_rows
head_log_probs = _head.head_log_probs
IS_ONE_PROGRAM = _processes.IS_ONE_PROGRAM
cut = _processes.cut
exchange = _processes.exchange
free_bytes = _processes.free_bytes
is_cut = _processes.is_cut
num_batch_shares = _processes.num_batch_shares
process_count = _processes.process_count
process_index = _processes.process_index
read = _processes.read
sharded_checkpoints = _processes.sharded_checkpoints
start_processes = _processes.start_processes


def num_row_shares() -> int:
    """Parts that the rows of a forward pass without training are cut in."""
    return num_batch_shares() if IS_ONE_PROGRAM else 1


__all__ = [
    "IS_ONE_PROGRAM",
    "AutocastScope",
    "HeadOptions",
    "Trainer",
    "cache_compilations",
    "count_layer_losses",
    "cut",
    "dataset",
    "device_names",
    "exchange",
    "free_bytes",
    "head_log_probs",
    "is_cut",
    "is_on_cpu",
    "map_parts",
    "num_batch_shares",
    "num_row_shares",
    "prepare_remat",
    "process_count",
    "process_index",
    "read",
    "refuse_layer_losses",
    "remat",
    "seed_step",
    "sharded_checkpoints",
    "start_processes",
    "write",
    "write_rows",
]
