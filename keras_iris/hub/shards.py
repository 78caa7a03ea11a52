"""Weights to safetensors files of at most 5 GB."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from keras_iris.hub.checkpoint import INDEX_FILE
from keras_iris.hub.weights import Weight

SHARD_BYTES = 5 * 10**9
TYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def write_shards(
    weights: Sequence[Weight],
    folder: Path,
    dtype: str,
    metadata: Mapping[str, str],
) -> None:
    """Writes the weights, and an index if there are several files.

    No more than one file's weights are in memory at a time.

    Args:
        weights: What to write, in this order.
        folder: Where.
        dtype: A key of `TYPES`.
        metadata: What is written into each file's header.

    Raises:
        ValueError: If a weight isn't finite in `dtype`.
    """
    import huggingface_hub

    by_name = {weight.name: weight for weight in weights}
    plan = huggingface_hub.split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda weight: weight.size * TYPES[dtype].itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in plan.filename_to_tensors.items():
        arrays = {name: _read(by_name[name], dtype) for name in names}
        save_file(arrays, folder / file, metadata={"format": "pt", **metadata})
    if plan.is_sharded:
        index = {
            "metadata": plan.metadata,
            "weight_map": plan.tensor_to_filename,
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _read(weight: Weight, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(weight.read().astype(TYPES[dtype]))
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(
            f"{weight.name!r} isn't finite in {dtype}. Training diverged, or "
            "the numbers are too large for float16; nothing was exported."
        )
    return array
