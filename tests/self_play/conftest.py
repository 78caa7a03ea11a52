import pytest
from self_play_helpers import make_self_play


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that nothing has disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    make_self_play(run_dir).run()
    return run_dir
