"""The harness' cache of results, as JSON and of one model.

The harness would unpickle what it reads, and tells no models apart.
"""

import contextlib
import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import keras

from keras_iris.data.tokenizer import Tokenizer
from keras_iris.models.lora import find_lora
from keras_iris.models.values import hash_variables


def check_cache(path: Path) -> None:
    """Refuses what the harness would open in a thread of its own.

    Args:
        path: As `use_cache` of the harness.

    Raises:
        ValueError: One of its files is no database.
    """
    for file in path.parent.glob(f"{path.name}_rank*.db"):
        try:
            with contextlib.closing(sqlite3.connect(file)) as database:
                database.execute("PRAGMA schema_version")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"The cache {file} can't be used: {error}. Name another file, "
                "or delete this one."
            ) from error


def keep_json(cache: Any, model: str) -> None:
    """Lets a cache hold JSON, and the results of a model alone.

    Args:
        cache: The `SqliteDict` of the harness.
        model: Its fingerprint.
    """

    def decode(text: str | bytes) -> Any:
        try:
            result = json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"Expected JSON in the cache {cache.filename}. Received: "
                f"{text[:40]!r}. Name another file, or delete this one."
            ) from error
        return tuple(result) if isinstance(result, list) else result

    cache.encode, cache.decode = json.dumps, decode
    cache.encode_key = lambda key: f"{model} {key}"


def fingerprint(
    causal_lm: keras.Model, tokenizer: Tokenizer, max_length: int
) -> str:
    """A hash of all that results depend on, but for the text."""
    config = causal_lm.backbone.get_config()
    # Keras numbers names in a process; the dtype's name is another part.
    config = {n: v for n, v in config.items() if n not in ("name", "dtype")}
    lora = find_lora(causal_lm.backbone)
    parts = [
        keras.saving.serialize_keras_object(config),
        lora and lora.get_config(),
        hash_variables(causal_lm.variables),
        causal_lm.dtype_policy.name,
        tokenizer.fingerprint(),
        max_length,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
