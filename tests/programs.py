"""Python programs that tests start."""

import os
import socket
from pathlib import Path

TESTS = Path(__file__).parent


def environment(num_devices=None, **variables):
    """The environment of a program that imports keras_iris and the tests.

    KerasHub and Keras import what isn't needed but is there, TensorFlow
    first of all, which takes them seconds: see `tests/without`.

    Args:
        num_devices: How many devices JAX is to see on a CPU, or `None`.
        **variables: Others, such as `KERAS_BACKEND`.
    """
    found = {**os.environ, **variables}
    if num_devices:
        devices = f"--xla_force_host_platform_device_count={num_devices}"
        found["XLA_FLAGS"] = f"{found.get('XLA_FLAGS', '')} {devices}"
    folders = [TESTS, TESTS.parent]
    if found.get("KERAS_BACKEND") in ("jax", "torch"):
        folders.insert(0, TESTS / "without")
    return found | {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def environments(number, num_devices=None):
    """Environments of processes that find each other, or of one alone.

    Args:
        number: How many there are.
        num_devices: As in `environment`.
    """
    if number == 1:
        return [environment(num_devices)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        environment(
            num_devices,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(number),
            RANK=str(rank),
        )
        for rank in range(number)
    ]
