import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Before anything imports TensorFlow, which KerasHub does.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compile much and run little, and much of it twice.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
# Without a largest size: processes that make room take each other's files.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# On GPUs JAX multiplies float32 with 10 bits after the point, unless told so.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Several test processes on few cores: waiting threads would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes checkpoints, each once: `checkpoint("qwen2", **options)`."""
    from tiny_checkpoints import save_checkpoint  # imports transformers

    folders = {}

    def make(architecture, **options):
        key = repr((architecture, sorted(options.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[key] = save_checkpoint(folder, architecture, **options)
        return folders[key]

    return make
