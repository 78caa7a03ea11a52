"""Where the processes of a run find each other."""

import os
import random
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

import keras

from keras_iris import backend

_SLURM_PORT = 12000  # and the last digits of the job's number


class Launch(NamedTuple):
    """How a process was started.

    Attributes:
        address: `"host:port"` of process 0, `None` where the backend knows.
        num_processes: How many there are, `None` likewise.
        process_id: From 0 on, `None` likewise.
    """

    address: str | None
    num_processes: int | None
    process_id: int | None


def initialize(
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Lets the processes of a run find each other.

    Call it first, before any array is made; where there is one process it
    does nothing. All processes get the same random seed, of process 0; call
    `keras.utils.set_random_seed` afterwards to choose it.

    Args:
        address: `"host:port"` of process 0. Without arguments they are read
            from the variables of Keras (`KERAS_DISTRIBUTION_JOB_ADDRESSES`,
            `..._NUM_PROCESSES`, `..._PROCESS_ID`), of `torchrun`
            (`MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE`, `RANK`), or of SLURM.
            On TPU pods JAX knows them.
        num_processes: The number of processes.
        process_id: This one's number, from 0 on.

    Returns:
        The number of processes.

    Raises:
        ValueError: Some of the three are missing, or TensorFlow is to run in
            several processes.
    """
    given = Launch(address, num_processes, process_id)
    if any(part is not None for part in given):
        launch: Launch | None = given
    else:
        launch = read_environment(os.environ)
    if launch is None or launch.num_processes == 1:
        return 1
    if None in launch and any(part is not None for part in launch):
        raise ValueError(
            "Several processes need an address, their number and this one's. "
            f"Received: {launch}. Pass all three, or set the variables of "
            "torchrun or SLURM."
        )
    backend.start_processes(*launch)
    seed = backend.exchange(str(random.SystemRandom().getrandbits(31)))[0]
    keras.utils.set_random_seed(int(seed))
    return backend.process_count()


def read_environment(variables: Mapping[str, str]) -> Launch | None:
    """How this process was started, by its environment.

    Args:
        variables: Those of the environment.

    Returns:
        `None` where nothing speaks of several processes.
    """
    if addresses := variables.get("KERAS_DISTRIBUTION_JOB_ADDRESSES"):
        return Launch(
            addresses.split(",")[0],
            _number(variables, "KERAS_DISTRIBUTION_NUM_PROCESSES"),
            _number(variables, "KERAS_DISTRIBUTION_PROCESS_ID"),
        )
    if host := variables.get("MASTER_ADDR"):
        return Launch(
            f"{host}:{variables.get('MASTER_PORT', 29500)}",
            _number(variables, "WORLD_SIZE"),
            _number(variables, "RANK"),
        )
    num_tasks = _number(variables, "SLURM_STEP_NUM_TASKS") or 1
    if num_tasks > 1:
        job = _number(variables, "SLURM_JOB_ID") or 0
        host = _first_host(variables["SLURM_STEP_NODELIST"])
        return Launch(
            f"{host}:{_SLURM_PORT + job % 10000}",
            num_tasks,
            _number(variables, "SLURM_PROCID"),
        )
    if "," in variables.get("TPU_WORKER_HOSTNAMES", ""):
        return Launch(None, None, None)
    return None


def process_index() -> int:
    """The number of this process among those of the run.

    Returns:
        A number from 0 on; 0 where there is one process. What one process is
        to do alone, such as to write a file, is done by number 0.
    """
    return backend.process_index()


def _number(variables: Mapping[str, str], name: str) -> int | None:
    text = variables.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name} has to be a number. Received: {text!r}")
    return int(text)


def _first_host(hosts: str) -> str:
    """The first of SLURM's hosts, which writes `node[3-5,9]`."""
    if "[" not in hosts:
        return hosts.split(",")[0]
    found = subprocess.run(
        ["scontrol", "show", "hostnames", hosts],
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.split()[0]
