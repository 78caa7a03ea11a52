"""Weights to safetensors files of at most 5 GB."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from keras_iris.hub.checkpoint import INDEX_FILE, SINGLE_FILE
from keras_iris.hub.weights import Weight

SHARD_BYTES = 5 * 10**9
BYTES_PER_NUMBER = {"bfloat16": 2, "float16": 2, "float32": 4}
_TYPES = {
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
        dtype: A key of `BYTES_PER_NUMBER`.
        metadata: What is written into each file's header.

    Raises:
        ValueError: If a weight isn't finite in `dtype`.
    """
    shards = list(_split(weights, BYTES_PER_NUMBER[dtype]))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {weight.name: _read(weight, dtype) for weight in shard}
        save_file(arrays, folder / name, metadata={"format": "pt", **metadata})
        weight_map.update(dict.fromkeys(arrays, name))
    if len(shards) > 1:
        numbers = sum(weight.size for weight in weights)
        size = numbers * BYTES_PER_NUMBER[dtype]
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _split(
    weights: Sequence[Weight], bytes_per_number: int
) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    size = 0
    for weight in weights:
        weight_size = weight.size * bytes_per_number
        if shard and size + weight_size > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(weight)
        size += weight_size
    yield shard


def _read(weight: Weight, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(weight.read().astype(_TYPES[dtype]))
    if not np.isfinite(array.astype(np.float32)).all():
        raise ValueError(
            f"{weight.name!r} isn't finite in {dtype}. Training diverged, or "
            "the numbers are too large for float16; nothing was exported."
        )
    return array
