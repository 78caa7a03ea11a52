"""A disk that is full, a folder that vanishes or can't be written to.

There is one error that says which file it is; nothing that was whole is lost,
and the run goes on after room is made.
"""

import importlib
import shutil
import subprocess
from functools import partial

import pytest
from self_play_helpers import assert_same_end, lines_of, make_self_play

from keras_iris import evaluation, hub
from keras_iris.callbacks import AlphaScheduler, SelfPlayCallback
from keras_iris.self_play.arrays import read_arrays
from keras_iris.self_play.run_dir import read_manifest

pytestmark = pytest.mark.slow
GONE = "metrics.jsonl can't be written: .*No such file"
FULL = r"can't be written: .*No space left.* Make room"


@pytest.fixture
def disk(tmp_path):
    """A file system in memory, of a few MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    make_self_play(run_dir).run()
    return run_dir


def _fill(disk):
    """Leaves no room but on the last page of each file."""
    with pytest.raises(OSError), open(disk / "filler", "ab", 0) as file:
        while file.write(bytes(4096)):
            pass


class At(SelfPlayCallback):
    """Does something at a moment of a run: in generate, score, fit."""

    def __init__(self, moment, action):
        super().__init__()
        self.moment, self.action = moment, action

    def _reach(self, moment):
        if moment == self.moment:
            self.action()

    def on_iteration_begin(self, iteration, logs=None):
        self._reach(f"iteration {iteration}")

    def on_generate_end(self, *arguments):
        self._reach("score")

    def on_train_batch_end(self, batch, logs=None):
        self._reach(f"step {int(self.model.optimizer.iterations)}")


def _run(run_dir, moment, action, **options):
    callbacks = [AlphaScheduler(), At(moment, action)]
    make_self_play(run_dir, callbacks=callbacks, **options).run()


def _check_whole(run_dir):
    read_manifest(run_dir / "manifest.json")
    for file in run_dir.rglob("*.safetensors"):
        read_arrays(file)
    assert not list(run_dir.rglob(".*keras_iris*"))


@pytest.mark.parametrize(
    "moment", ["iteration 1", "score", "step 1", "step 8", "iteration 2"]
)
def test_full_disk_in_a_run(moment, disk, finished):
    run_dir = disk / "run"
    with pytest.raises(OSError, match=FULL):
        _run(run_dir, moment, partial(_fill, disk))
    _check_whole(run_dir)
    before = {f: f.read_bytes() for f in run_dir.rglob("iteration_*/*/*")}
    with pytest.raises((OSError, ValueError), match="No space left"):
        make_self_play(run_dir).run()  # nothing is lost by trying
    _check_whole(run_dir)
    (disk / "filler").unlink()
    make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)
    assert all(file.read_bytes() == old for file, old in before.items())


def test_full_disk_in_a_report(disk, finished):
    run_dir = shutil.copytree(finished, disk / "run")
    page = evaluation.report(run_dir)
    before = {f: f.read_bytes() for f in (page, *run_dir.glob("plots/*"))}
    _fill(disk)
    with pytest.raises(ValueError, match="report into .*No space left"):
        evaluation.report(run_dir)
    assert {file: file.read_bytes() for file in before} == before
    assert not list(run_dir.rglob(".*keras_iris*"))
    (disk / "filler").unlink()
    evaluation.report(run_dir)


def test_full_disk_in_an_export(disk, checkpoint, monkeypatch):
    causal_lm = hub.load(checkpoint("qwen2"))
    with pytest.raises(OSError, match="GiB left, expected .*Make room"):
        hub.export(causal_lm, disk / "model")
    # Somebody else may write at the same time.
    module = importlib.import_module("keras_iris.hub.export")
    monkeypatch.setattr(module, "_check_disk", lambda *arguments: None)
    folder = hub.export(causal_lm, disk / "model")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    _fill(disk)
    with pytest.raises(OSError, match=FULL):
        hub.export(causal_lm, disk / "model")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (disk / "filler").unlink()
    hub.export(causal_lm, disk / "model")
    assert {file.name for file in disk.iterdir()} == {"model"}
    assert set(folder.iterdir()) == before.keys()
    hub.load(folder)


def test_read_only(disk, finished):
    """Nothing can be written, and all can be read."""
    run_dir = shutil.copytree(finished, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ValueError, match="can't be written to: .*Read-only"):
        make_self_play(run_dir)
    with pytest.raises(ValueError, match="Read-only.*Copy the folder"):
        evaluation.report(run_dir)
    steps = lines_of(run_dir, "step")
    assert [s["step"] for s in steps] == [s + 1 for s in range(len(steps))]
    assert "Training" in evaluation.scores_table(run_dir)


def test_folder_that_vanishes(tmp_path, finished):
    run_dir = tmp_path / "run"
    with pytest.raises(OSError, match=GONE):
        _run(run_dir, "step 1", partial(shutil.rmtree, run_dir))
    assert not run_dir.exists()
    make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def test_folder_that_vanishes_before_a_checkpoint(tmp_path, finished):
    """As a disk that is unmounted: what is written then is elsewhere."""
    run_dir, away = tmp_path / "run", tmp_path / "away"
    with pytest.raises(OSError, match=GONE):
        _run(run_dir, "step 3", partial(run_dir.rename, away))
    with pytest.raises(ValueError, match="without its manifest.json"):
        make_self_play(run_dir)
    make_self_play(away).run()
    assert_same_end(away, finished)


@pytest.mark.parametrize("lost", ["starts", "iteration_001", "manifest.json"])
def test_part_of_a_folder_that_vanishes(lost, tmp_path, finished):
    """The run goes on with what is in memory, or says what it misses."""
    run_dir = tmp_path / "run"

    def remove():
        path = run_dir / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    _run(run_dir, "step 3", remove)
    assert_same_end(run_dir, finished)
    make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)
