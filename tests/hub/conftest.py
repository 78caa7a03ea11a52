import pytest
from tiny_checkpoints import save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes checkpoints, each once: `checkpoint("qwen2", **options)`."""
    folders = {}

    def make(architecture, **options):
        key = (architecture, *sorted(options.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[key] = save_checkpoint(folder, architecture, **options)
        return folders[key]

    return make
