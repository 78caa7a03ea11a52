"""Several processes on JAX: one program over the devices of all."""

from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_iris.arguments import check_shared
from keras_iris.backend.jax_checkpoint import ShardedCheckpoints
from keras_iris.backend.local_rows import LocalRows

# A process that is gone ends the others after so long.
_HEARTBEAT_SECONDS = 30

IS_ONE_PROGRAM = True


def start_processes(
    address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects this process with the others.

    Args:
        address: `"host:port"` of process 0; None where JAX knows.
        num_processes: How many there are; None likewise.
        process_id: From 0 on; None likewise.
    """
    jax.distributed.initialize(
        address,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )


def process_count() -> int:
    """How many processes there are."""
    return jax.process_count()


def process_index() -> int:
    """This one's number, from 0 on."""
    return jax.process_index()


def exchange(text: str) -> list[str]:
    """Gives every process the texts of all, in their order; a barrier."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(data)]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    rows = rows.reshape(len(sizes), -1)
    return [
        bytes(row[: int(size)]).decode()
        for row, size in zip(rows, np.ravel(sizes), strict=True)
    ]


def read(array: Any) -> np.ndarray:
    """A tensor's or variable's values, whole in every process."""
    array = getattr(array, "value", array)
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def replicate(tree: Any) -> Any:
    """The same tensors, whole on every device; inside of compiled code."""
    distribution = keras.distribution.distribution()
    if jax.process_count() == 1 or distribution is None:
        return tree
    whole = jax.sharding.NamedSharding(
        distribution.device_mesh.backend_mesh, jax.sharding.PartitionSpec()
    )
    return jax.lax.with_sharding_constraint(tree, whole)


def cut(array: Any) -> Any:
    """An array that every process has whole, cut along its first axis.

    Args:
        array: Its rows are a batch of all processes. In compiled code a
            tensor, of which other axes may be cut, too.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return array
    if isinstance(array, jax.core.Tracer):
        others = [jax.sharding.PartitionSpec.UNCONSTRAINED] * (array.ndim - 1)
        spec = jax.sharding.PartitionSpec(distribution.batch_dim_name, *others)
        mesh = distribution.device_mesh.backend_mesh
        layout = jax.sharding.NamedSharding(mesh, spec)
        return jax.lax.with_sharding_constraint(array, layout)
    check_shared("batch_size", len(array), num_batch_shares())
    layout = distribution.get_data_layout(array.shape).backend_layout
    return jax.make_array_from_callback(array.shape, layout, array.__getitem__)


def num_batch_shares() -> int:
    """Parts that a batch is cut in, over the devices of all processes."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def free_bytes() -> int | None:
    """Memory that is free on the fullest device of all; None if not told."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    free = [
        stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        for stats in told
    ]
    # Every process has to go on with the same number.
    least = min(map(int, exchange(str(min(free)))))
    return least if least > 0 else None


def is_cut() -> bool:
    """Whether there is a distribution over several devices."""
    distribution = keras.distribution.distribution()
    return (
        distribution is not None and distribution.device_mesh.devices.size > 1
    )


def sharded_checkpoints() -> ShardedCheckpoints:
    """Writes and reads variables that are cut over devices."""
    return ShardedCheckpoints()


def local_rows(batches: Any) -> Any:
    """A data set's batches as this process feeds them: its share of each."""
    if jax.process_count() == 1:
        return batches
    distribution = keras.distribution.distribution()
    if distribution is None:
        raise ValueError(
            f"There are {jax.process_count()} processes and no distribution: "
            "each would train on its own. Call keras.distribution."
            "set_distribution(keras_iris.distribution.make_distribution())."
        )
    count = min(num_batch_shares(), jax.process_count())
    return LocalRows(batches, count, distribution.data_shard_id)
