"""A run's folder tells the truth, whatever happens around it."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from self_play_helpers import (
    Interrupt,
    Stop,
    begin,
    make_again,
    make_examples,
    make_self_play,
)
from tiny_models import make_causal_lm

import keras_iris
from keras_iris.callbacks import AlphaScheduler
from keras_iris.evaluation import HeldOut
from keras_iris.files import hash_arrays, locked, remove_unfinished, replaced
from keras_iris.self_play.arrays import read_arrays, write_arrays
from keras_iris.self_play.checkpoints import Checkpoints
from keras_iris.self_play.settings import versions


class TestWeights:
    def test_another_model_is_refused(self, finished):
        with pytest.raises(ValueError, match="weights: '.* there, '.* here"):
            make_self_play(finished, seed_of_weights=1)

    def test_another_model_is_refused_before_the_first_checkpoint(
        self, tmp_path
    ):
        begin(make_self_play(tmp_path))
        with pytest.raises(ValueError, match="weights: "):
            make_self_play(tmp_path, seed_of_weights=1)

    def test_other_frozen_weights_are_refused(self, tmp_path):
        def start(value):
            model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
            frozen = model.causal_lm.backbone.get_layer("token_embedding")
            frozen.embeddings.assign(np.full(frozen.embeddings.shape, value))
            frozen.trainable = False
            model.compile(loss=keras_iris.losses.IRIS())
            return keras_iris.SelfPlay(
                model, make_examples(), tmp_path, batch_size=8
            )

        begin(start(0.5))
        start(0.5)
        with pytest.raises(ValueError, match="weights: "):
            start(0.25)

    def test_the_model_that_a_run_has_left_goes_on(self, tmp_path):
        """A cell that was interrupted and is run again."""

        self_play = make_self_play(
            tmp_path, callbacks=[AlphaScheduler(), Interrupt(2)]
        )
        with pytest.raises(KeyboardInterrupt):
            self_play.run()
        make_again(self_play).run()
        # Other weights in the same model are another model.
        for variable in self_play.model.trainable_variables:
            variable.assign(variable + 0.01)
        with pytest.raises(ValueError, match="weights: "):
            make_again(self_play)

    def test_another_learning_rate_of_a_callback_goes_on(self, tmp_path):
        """As a run has left it, and no other."""
        rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.003)
        self_play = make_self_play(
            tmp_path, epochs=1, iterations=1, callbacks=[rates]
        )
        self_play.run()
        with pytest.warns(UserWarning, match="LearningRateScheduler'. there"):
            make_again(self_play, callbacks=()).run()
        self_play.model.optimizer.learning_rate = 0.002
        with pytest.raises(ValueError, match="_rate: 0.00.* there, 0.002"):
            make_again(self_play, callbacks=())

    def test_a_manifest_tells_of_the_model_as_the_run_begins(self, tmp_path):
        self_play = make_self_play(tmp_path)
        variable = self_play.model.trainable_variables[0]
        variable.assign(variable + 1.0)
        self_play.model.optimizer.learning_rate = 0.5
        begin(self_play)
        with pytest.raises(ValueError) as error:
            make_self_play(tmp_path)
        assert "weights: " in str(error.value)
        assert "optimizer.learning_rate: 0.5 there" in str(error.value)
        make_again(self_play, iterations=2)


def test_another_run_that_began_meanwhile(tmp_path):
    first = make_self_play(tmp_path)
    second = make_self_play(tmp_path, seed=1)
    begin(first)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        second.run()


class TestManifest:
    def test_versions(self, finished):
        manifest = json.loads((finished / "manifest.json").read_text())
        backend = keras.backend.backend()
        names = {"python", "keras_iris", "keras", "keras-hub", "numpy", backend}
        assert manifest["versions"].keys() == names
        assert manifest["versions"]["keras"] == keras.__version__
        assert manifest["execution"]["device"]

    def test_another_version_is_told_of(self, tmp_path):
        begin(make_self_play(tmp_path))
        file = tmp_path / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest["versions"]["keras"] = "2.0"
        file.write_text(json.dumps(manifest))
        line = f"keras: '2.0' there, '{versions()['keras']}' here"
        again = make_self_play(tmp_path)
        with pytest.warns(UserWarning, match=line):
            begin(again)
        manifest = json.loads(file.read_text())
        assert manifest["versions"] == versions()
        assert manifest["earlier"][0]["versions"]["keras"] == "2.0"


class TestBest:
    def _run(self, run_dir, values, **options):
        values = iter(values)
        return make_self_play(
            run_dir,
            evaluate=lambda model: {"nll": next(values)},
            keep_best="nll",
            **options,
        )

    def test_the_weights_of_the_best_iteration_are_kept(self, tmp_path):
        file = tmp_path / "best.safetensors"
        self_play = self._run(tmp_path, [3.0, 1.0, 2.0])
        self_play.run()
        best = {"score": "nll", "mode": "min", "iteration": 1, "value": 1.0}
        assert self_play.best() == self_play.load_best() == best
        start = read_arrays(Checkpoints(tmp_path).start(2))[0]
        for number, variable in enumerate(self_play.model.trainable_variables):
            value = keras.ops.convert_to_numpy(variable)
            np.testing.assert_array_equal(value, start[f"{number:05d}"])
        # Another score: the best since then, whatever the log says.
        other = make_again(
            self_play,
            iterations=3,
            evaluate=lambda model: {"nll": 9.0, "accuracy": 0.1},
            keep_best="accuracy",
        )
        other.run()
        assert other.best()["iteration"] == other.load_best()["iteration"] == 3
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(ValueError, match="best.safetensors can't be read"):
            other.load_best()
        with pytest.warns(UserWarning, match="best.safetensors.* is removed"):
            make_again(self_play, iterations=3).run()
        assert not file.exists()

    def test_the_start_may_be_the_best(self, tmp_path):
        self_play = self._run(tmp_path, [1.0, 2.0, float("nan")])
        before = self_play.model.get_weights()
        self_play.run()
        assert self_play.load_best()["iteration"] == 0
        after = self_play.model.get_weights()
        names = [v.name for v in self_play.model.weights]
        for name, left, right in zip(names, before, after, strict=True):
            if name not in ("alpha", "gap", "gap_sums"):
                np.testing.assert_array_equal(left, right, name)

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="'taste' is better isn't known"):
            make_self_play(tmp_path, keep_best="taste")
        with pytest.raises(ValueError, match="needs `evaluate`"):
            make_self_play(tmp_path, keep_best="nll", evaluate=None)
        with pytest.raises(ValueError, match="'loss' isn't a score"):
            make_self_play(tmp_path / "a", keep_best="loss").run()
        with pytest.raises(ValueError, match="Run with `keep_best`"):
            make_self_play(tmp_path / "b").load_best()


class TestLock:
    def test_two_processes(self, tmp_path):
        code = f"""
import runpy, time
from pathlib import Path
locked = runpy.run_path({keras_iris.files.__file__!r})["locked"]
with locked(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE
        )
        try:
            assert process.stdout.readline() == b"held\n"
            self_play = make_self_play(tmp_path)
            with pytest.raises(
                ValueError, match=f"in use by process {process.pid} on "
            ):
                self_play.run()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        # A dead process holds nothing.
        with locked(tmp_path):
            pass

    def test_two_in_one_process(self, tmp_path):
        with locked(tmp_path):
            with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
                with locked(tmp_path):
                    pass

    def test_nobody_removes_what_another_run_writes(self, tmp_path):
        """The control of a run is a run of its own, in a sub-folder."""
        (tmp_path / "control").mkdir()
        with replaced(tmp_path / "control" / "a") as temporary:
            temporary.write_text("half")
            begin(make_self_play(tmp_path))
            temporary.write_text("whole")
        assert (tmp_path / "control" / "a").read_text() == "whole"

    def test_what_a_killed_process_left_is_removed(self, tmp_path):
        left = tmp_path / ".manifest.json-0.keras_iris-new"
        left.write_text("half")
        remove_unfinished(tmp_path)
        assert not left.exists()


class TestFileSystems:
    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
        assert make_self_play("~/x").folder.path == tmp_path / "home" / "x"
        assert not (tmp_path / "~").exists()

    @pytest.mark.skipif(os.name == "nt", reason="which has no umask")
    @pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0, 0o666)])
    def test_umask(self, umask, mode, tmp_path):
        old = os.umask(umask)
        try:
            write_arrays(tmp_path / "a", {"a": np.ones(2)}, {})
        finally:
            os.umask(old)
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode

    def test_windows_opens_no_folders_and_syncs_what_is_writable(
        self, tmp_path, monkeypatch
    ):
        opened, fsync = os.open, os.fsync

        def open_(path, flags, *more, **options):
            if Path(path).is_dir():
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, flags, *more, **options)

        def sync(descriptor):
            import fcntl

            if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
                raise OSError(9, "Bad file descriptor")
            fsync(descriptor)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "fsync", sync)
        write_arrays(tmp_path / "a", {"a": np.ones(2)}, {})
        assert read_arrays(tmp_path / "a")[0]["a"].tolist() == [1, 1]

    def test_network_file_systems_that_sync_no_folders(
        self, tmp_path, monkeypatch
    ):
        fsync = os.fsync

        def sync(descriptor):
            import stat

            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(22, "Invalid argument")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        write_arrays(tmp_path / "a", {"a": np.ones(2)}, {})

    def test_a_checkpoint_is_in_memory_once(self, tmp_path):
        """At 200 MB, at most a tenth more while it is written."""
        code = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
import keras
import numpy as np
from keras_iris.self_play.checkpoints import Checkpoints

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

variables = [
    keras.Variable(np.full((1_250_000,), i, "float32")) for i in range(40)
]
small = Checkpoints(Path({str(tmp_path)!r}) / "small")
small.save([keras.Variable([1.0])], dict(iteration=1, epoch=0, batch=0))
before, peak, is_done = resident(), 0, False

def watch():
    global peak
    while not is_done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
folder = Checkpoints(Path({str(tmp_path)!r}) / "large")
folder.save(variables, dict(iteration=1, epoch=0, batch=0))
is_done = True
thread.join()
print((peak - before) / 200e6)
"""
        if not sys.platform.startswith("linux"):
            pytest.skip("reads /proc")
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert float(result.stdout.split()[-1]) < 0.1


def test_scores_of_other_examples_are_refused(tmp_path):
    """They, and what was best by them, can't be compared."""

    def held_out(seed):
        return HeldOut(make_examples(6, seed=seed), batch_size=2, samples=0)

    def start(**options):
        return make_self_play(tmp_path, epochs=1, callbacks=[], **options)

    start(iterations=1, evaluate=held_out(5)).run()
    with pytest.raises(ValueError, match="evaluate.examples: '.*' there, '.*'"):
        start(evaluate=held_out(6))
    # Without them it goes on, and the first ones are still known.
    start(iterations=2, evaluate=None).run()
    with pytest.raises(ValueError, match="evaluate.examples"):
        start(iterations=3, evaluate=held_out(6))
    start(iterations=3, evaluate=held_out(5)).run()


def test_other_callbacks_are_told_of(tmp_path):
    options = dict(iterations=1, epochs=1)
    make_self_play(tmp_path, callbacks=[], **options).run()
    slower = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate)
    with pytest.warns(UserWarning, match="callbacks: .* there, .*RateSchedul"):
        make_self_play(tmp_path, callbacks=[slower], **options).run()


def test_texts_of_a_run_that_is_refused_are_not_written(tmp_path):
    run = make_self_play(tmp_path, iterations=1, epochs=1, callbacks=[])
    run.folder.texts["config.yaml"] = "text"
    with locked(tmp_path), pytest.raises(ValueError, match="in use"):
        run.run()
    assert not (tmp_path / "config.yaml").exists()
    run.run()
    assert (tmp_path / "config.yaml").read_text() == "text"


def test_hash_of_arrays():
    """Values, types and shapes of any kind; other values, another hash."""
    array = np.arange(6, dtype="float32")
    assert hash_arrays({"a": array}) == hash_arrays({"a": array.copy()})
    assert hash_arrays({"a": array}) != hash_arrays({"a": array[::-1]})
    scalar = np.array(1.0)
    assert hash_arrays({"a": scalar}) != hash_arrays({"a": scalar + 1})


def test_hashing_is_fast(tmp_path):
    """7 billion weights take seconds, not minutes: 1 GB/s at the least."""
    array = np.ones(25_000_000, "float32")
    start = time.perf_counter()
    hash_arrays({"a": array})
    assert time.perf_counter() - start < 0.1


def test_damage_anywhere_is_noticed(tmp_path):
    """The checksum is of the strings and names in the header, too."""
    file = tmp_path / "a"
    write_arrays(file, {"a": np.ones(2)}, {"position": "17"})
    whole = file.read_bytes()
    assert read_arrays(file)[1]["position"] == "17"
    for old, new in ((b'"17"', b'"18"'), (b'"a"', b'"b"')):
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            read_arrays(file)


def test_copies_of_checkpoints_stay(tmp_path):
    make_self_play(tmp_path, iterations=1).run()
    (start, *_) = Checkpoints(tmp_path).starts()
    within = make_self_play(tmp_path, callbacks=[AlphaScheduler(), Stop(1)])
    within.run()
    copies = [
        tmp_path / "checkpoint.safetensors.bak",
        tmp_path / "checkpoint-good.safetensors",
        start.with_name("iteration_001 copy.safetensors"),
        start.with_name("iteration_001.safetensors.bak"),
        start.with_name("my tmp"),
    ]
    for copy in copies:
        copy.write_bytes(b"mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_self_play(tmp_path).run()
    assert [copy.read_bytes() for copy in copies] == [b"mine"] * 5
