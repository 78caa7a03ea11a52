"""TensorFlow runs in one process, with replicas of the model in it."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_iris.backend.refusals import refuse_sharded_checkpoints

IS_ONE_PROGRAM = True


def start_processes(
    address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Refuses: several processes need JAX or PyTorch."""
    raise ValueError(
        "On TensorFlow the devices are those of one process: make the model "
        "under tf.distribute.MirroredStrategy. Received: "
        f"{num_processes} processes. Set KERAS_BACKEND to jax or torch."
    )


def process_count() -> int:
    """One."""
    return 1


def process_index() -> int:
    """Zero."""
    return 0


def exchange(text: str) -> list[str]:
    """The text of the one process."""
    return [text]


def read(array: Any) -> np.ndarray:
    """A tensor's or variable's values."""
    # A variable of replicas has no array of its own.
    tensor = tf.convert_to_tensor(getattr(array, "value", array))
    return keras.ops.convert_to_numpy(tensor)


def cut(array: np.ndarray) -> np.ndarray:
    """The array."""
    return array


def is_cut() -> bool:
    """No: every device has all variables."""
    return False


def sharded_checkpoints() -> Any:
    """Refuses: the checkpoint was written under a distribution, on JAX."""
    refuse_sharded_checkpoints()


def num_batch_shares() -> int:
    """Parts that a batch is cut in."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def free_bytes() -> int | None:
    """Memory that is free on the fullest GPU; None where nobody tells.

    TensorFlow (2.21) tells the limit of a GPU that was given one.
    """
    free: list[int] = []
    for number, gpu in enumerate(tf.config.list_physical_devices("GPU")):
        told = tf.config.get_logical_device_configuration(gpu) or []
        limits = [part.memory_limit for part in told if part.memory_limit]
        if not limits:
            return None
        used = tf.config.experimental.get_memory_info(f"GPU:{number}")
        free.append(int(sum(limits) * 2**20 - used["current"]))
    return min(free, default=None)


def gather(tensor: tf.Tensor) -> tf.Tensor:
    """The rows of all replicas, in their order."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return tensor
    rows = replica.all_gather(tensor, axis=0)
    # TensorFlow (2.21) forgets what it knows of the other dimensions.
    return tf.ensure_shape(rows, (None, *tensor.shape[1:]))


def gathered(x: Any, y: tf.Tensor, sample_weight: tf.Tensor | None) -> Any:
    """What loss and metrics see of a batch, of all replicas."""
    mask = gather(tf.cast(x["response_mask"], tf.float32))
    weight = None if sample_weight is None else gather(sample_weight)
    return {**x, "response_mask": mask}, gather(y), weight
