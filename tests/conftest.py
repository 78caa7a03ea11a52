import os

import pytest

# Before anything imports TensorFlow, which KerasHub does.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Several test processes on few cores: waiting threads would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes checkpoints, each once: `checkpoint("qwen2", **options)`."""
    from tiny_checkpoints import save_checkpoint  # imports transformers

    folders = {}

    def make(architecture, **options):
        key = (architecture, *sorted(options.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[key] = save_checkpoint(folder, architecture, **options)
        return folders[key]

    return make
