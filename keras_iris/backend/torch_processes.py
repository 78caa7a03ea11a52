"""Several processes on PyTorch: each has the model and some of the rows."""

import os
from datetime import timedelta
from typing import Any

import keras
import numpy as np
import torch
from torch import distributed

from keras_iris.backend.local_rows import LocalRows
from keras_iris.backend.refusals import refuse_sharded_checkpoints

IS_ONE_PROGRAM = False
# The longest wait for another process: one may answer all prompts. PyTorch
# waits ten minutes for NCCL. If a process dies, `torchrun` ends the others.
_LONGEST_WAIT = timedelta(days=7)


def start_processes(
    address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects this process with the others: see the one of JAX."""
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group(
        "nccl" if has_gpu else "gloo",
        init_method=f"tcp://{address}",
        timeout=_LONGEST_WAIT,
        world_size=num_processes,
        rank=process_id,
    )


def process_count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_index() -> int:
    """This one's number, from 0 on."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def exchange(value: Any) -> list[Any]:
    """Gives every process the values of all, in their order; a barrier."""
    values = [value] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(values, value)
    return values


def read(array: Any) -> np.ndarray:
    """A tensor's or variable's values."""
    return keras.ops.convert_to_numpy(getattr(array, "value", array))


def cut(array: np.ndarray) -> np.ndarray:
    """The array: a process generates on its own."""
    return array


def is_cut() -> bool:
    """No: every device has all variables."""
    return False


def sharded_checkpoints() -> Any:
    """Refuses: the checkpoint was written under a distribution, on JAX."""
    refuse_sharded_checkpoints()


def num_batch_shares() -> int:
    """Parts that a batch is cut in."""
    return process_count()


def free_bytes() -> int | None:
    """Memory of this process's GPU that is free; None without a GPU.

    What PyTorch keeps for tensors to come is free as well.
    """
    if not torch.cuda.is_available():
        return None
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0] + kept)


def local_rows(batches: Any) -> Any:
    """A data set's batches as this process feeds them: its share of each."""
    if process_count() == 1:
        return batches
    return LocalRows(batches, process_count(), process_index())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, in their order; without gradient."""
    if process_count() == 1:
        return tensor
    tensor = tensor.detach().contiguous()
    parts = [torch.empty_like(tensor) for _ in range(process_count())]
    distributed.all_gather(parts, tensor)
    return torch.cat(parts)


def add_up(tensors: list[torch.Tensor | None]) -> None:
    """Adds up the tensors of all processes, in place."""
    if process_count() == 1:
        return
    for tensor in tensors:
        if tensor is not None:
            distributed.all_reduce(tensor)
