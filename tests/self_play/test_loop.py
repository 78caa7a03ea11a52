import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.callbacks import AlphaSchedule, AlphaScheduler, TokenGap
from keras_iris.data import ChatTemplate, Example, SymbolTokenizer
from keras_iris.files import replaced
from keras_iris.generation import Completion, KerasEngine
from keras_iris.self_play.arrays import read_arrays, write_arrays

END = 1


def make_examples(number=24, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Example(
            rng.integers(2, VOCABULARY_SIZE, rng.integers(2, 6)).astype(
                "int32"
            ),
            np.append(
                rng.integers(2, VOCABULARY_SIZE, rng.integers(1, 6)), END
            ).astype("int32"),
        )
        for _ in range(number)
    ]


def make_self_play(  # noqa: PLR0913
    run_dir, *, examples=None, learning_rate=0.01, dropout=0.0, **options
):
    model = keras_iris.SelfPlayModel(
        make_causal_lm(num_layers=1, dropout=dropout)
    )
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras_iris.losses.IRIS(),
    )
    options = {
        "iterations": 2,
        "epochs": 2,
        "batch_size": 8,
        "max_response_length": 6,
        "shard_size": 10,
        "checkpoint_every_steps": 2,
        "callbacks": [AlphaScheduler()],
        "evaluate": lambda model: {"alpha": float(model.alpha.value)},
        **options,
    }
    return keras_iris.SelfPlay(
        model,
        make_examples() if examples is None else examples,
        run_dir,
        **options,
    )


def final_arrays(run_dir):
    return read_arrays(run_dir / "checkpoint.safetensors")[0]


def assert_same_end(left, right):
    ends = final_arrays(left), final_arrays(right)
    assert ends[0].keys() == ends[1].keys()
    for name in ends[0]:
        np.testing.assert_array_equal(ends[0][name], ends[1][name], name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing has disturbed."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    make_self_play(run_dir).run()
    return run_dir


def test_what_a_run_leaves(finished):
    lines = keras_iris.evaluation.read_metrics(finished)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 13))
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert [line["iteration"] for line in evaluations] == [0, 1, 2]
    # At the start of an iteration the policy is the opponent.
    for step in (0, 6):
        assert abs(steps[step]["margin"]) < 1e-4
    assert steps[5]["margin"] > 0.01
    for folder in ("synthetic", "opponent"):
        shards = sorted((finished / "iteration_002" / folder).iterdir())
        assert [s.name for s in shards] == [
            f"{i:05d}.safetensors" for i in range(3)
        ]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["settings"]["batch_size"] == 8


def test_synthetic_responses_differ_between_iterations(finished):
    name = "synthetic/00000.safetensors"
    first, _ = read_arrays(finished / "iteration_001" / name)
    second, _ = read_arrays(finished / "iteration_002" / name)
    assert first["token_ids"].tolist() != second["token_ids"].tolist()


def test_finished_run_is_left_as_it_is(finished):
    before = final_arrays(finished)
    make_self_play(finished).run()
    for name, array in final_arrays(finished).items():
        np.testing.assert_array_equal(array, before[name])


class _Killed(BaseException):
    pass


def _kill_at_write(monkeypatch, number):
    """Dies instead of the `number`-th write of a whole file."""
    count = 0

    def write(path, arrays, metadata):
        nonlocal count
        count += 1
        if count == number:
            (path.parent / f".{path.name}-1").write_bytes(b"half")
            raise _Killed
        write_arrays(path, arrays, metadata)

    monkeypatch.setattr("keras_iris.self_play.run_dir.write_arrays", write)


# Writes: 1 start; 2-4 synthetic; 5-7 opponent; 8 mid-epoch; 9 epoch; ...
@pytest.mark.parametrize(
    "write",
    [
        6,
        14,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 9, 20)),
    ],
)
def test_killed_at_a_write(write, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _kill_at_write(patch, write)
        with pytest.raises(_Killed):
            make_self_play(tmp_path / "run").run()
    make_self_play(tmp_path / "run").run()
    assert_same_end(tmp_path / "run", finished)


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="elsewhere the seeds of dropout are variables, as weights are",
)
def test_killed_in_fit_with_dropout(tmp_path, monkeypatch):
    ends = tmp_path / "whole", tmp_path / "killed"
    options = dict(dropout=0.3, iterations=1, epochs=1)
    options["checkpoint_every_steps"] = 1
    make_self_play(ends[0], **options).run()
    killed = make_self_play(ends[1], **options)
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 9)
        with pytest.raises(_Killed):
            killed.run()
    _, metadata = read_arrays(ends[1] / "checkpoint.safetensors")
    assert json.loads(metadata["position"])["batch"] == 1
    # Random numbers that were drawn in between change nothing.
    keras.random.normal((7,))
    make_self_play(ends[1], **options).run()
    assert_same_end(*ends)


def test_kill_9_in_the_middle_of_fit(finished, tmp_path):
    """A real process, killed by the system after 9 steps."""
    run_dir = tmp_path / "run"
    code = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]}
import keras, test_loop
from pathlib import Path
class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations.value) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
s = test_loop.make_self_play(Path({str(run_dir)!r}))
s.callbacks.append(Kill())
s.run()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    (run_dir / ".checkpoint.safetensors-x.keras_iris-new").write_text("half")
    make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)
    assert not list(run_dir.rglob(".*"))


def test_corrupt_shard_is_made_again(finished, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 8)
        with pytest.raises(_Killed):
            make_self_play(run_dir).run()
    shard = run_dir / "iteration_001/opponent/00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="Making .* again"):
        make_self_play(run_dir).run()
    assert_same_end(run_dir, finished)


def test_shard_lost_after_training_has_begun(finished, tmp_path):
    """The weights that made it are gone."""
    run_dir = tmp_path / "run"
    goes_on = [AlphaScheduler(), _Stop(99)]
    make_self_play(run_dir, callbacks=[AlphaScheduler(), _Stop(1)]).run()
    shard = run_dir / "iteration_001/opponent/00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    with pytest.warns(UserWarning, match="Making .* again"):
        with pytest.raises(ValueError, match="lost.*Put the file back"):
            make_self_play(run_dir, callbacks=goes_on).run()
    shard.write_bytes(whole)
    make_self_play(run_dir, callbacks=goes_on).run()
    assert_same_end(run_dir, finished)


class _Stop(keras.callbacks.Callback):
    """Asks to stop at the so-manieth batch of an epoch."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = batch == self.batch


def test_the_same_model_goes_on_with_its_own_run(tmp_path):
    """A cell of a notebook that is run again."""
    self_play = make_self_play(tmp_path / "run", iterations=1, epochs=1)
    self_play.run()
    assert float(self_play.model.alpha.value) != 1.0
    keras_iris.SelfPlay(
        self_play.model,
        self_play.examples,
        tmp_path / "run",
        iterations=1,
        epochs=1,
        batch_size=8,
        max_response_length=6,
        shard_size=10,
        callbacks=[AlphaScheduler()],
    ).run()


def test_nan_weights_do_not_replace_the_checkpoint(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:  # the epoch's last
                variable = self.model.trainable_variables[0]
                variable.assign(np.full(variable.shape, np.nan, "float32"))

    run_dir = tmp_path / "run"
    self_play = make_self_play(run_dir, iterations=1, epochs=1)
    self_play.callbacks = [Break()]
    with pytest.raises(FloatingPointError, match="not finite.*is of before"):
        self_play.run()
    assert all(np.isfinite(a).all() for a in final_arrays(run_dir).values())


def test_other_settings_are_refused_line_by_line(finished):
    with pytest.raises(ValueError) as error:
        make_self_play(finished, batch_size=6, seed=1, learning_rate=0.5)
    assert "batch_size: 8 there, 6 here" in str(error.value)
    assert "seed: 0 there, 1 here" in str(error.value)
    assert "optimizer.learning_rate: 0.0" in str(error.value)


def test_other_arguments_of_the_scheduler_are_refused(finished):
    with pytest.raises(ValueError, match="max_alpha: 2.0 there, 1.0 here"):
        make_self_play(finished, callbacks=[AlphaScheduler(max_alpha=1.0)])


class _Gap(TokenGap):
    def __init__(self, scale):
        self.scale = scale
        self.function = lambda value: value  # no two of them are equal


def _decay(steps):
    return keras.optimizers.schedules.CosineDecay(2.0, steps)


@pytest.mark.parametrize(
    ("there", "same", "other", "message"),
    [
        (
            AlphaScheduler(gap_estimator=_Gap(1.0)),
            AlphaScheduler(gap_estimator=_Gap(1.0)),
            AlphaScheduler(gap_estimator=_Gap(2.0)),
            r'"scale": 1.0.* there, .*"scale": 2.0.* here',
        ),
        (
            AlphaSchedule(_decay(10)),
            AlphaSchedule(_decay(10)),
            AlphaSchedule(_decay(20)),
            r'"decay_steps": 10.* there, .*"decay_steps": 20.* here',
        ),
        (
            AlphaSchedule(lambda step: 1.0),
            AlphaSchedule(lambda step: 1.0),
            AlphaSchedule(_decay(10)),
            r'\["function", \{\}\].* there, .*CosineDecay.* here',
        ),
    ],
    ids=["gap estimator", "schedule", "function"],
)
def test_parts_of_a_callback(there, same, other, message, tmp_path):
    make_self_play(tmp_path, callbacks=there).folder.write_manifest()
    make_self_play(tmp_path, callbacks=same)
    with pytest.raises(ValueError, match=message):
        make_self_play(tmp_path, callbacks=other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4}, "engine.batch_size: 32 there, 4 here"),
        (
            {"sampler": keras_hub.samplers.RandomSampler(temperature=0.3)},
            r"samples of the model itself.* RandomSampler\(temperature=0.3\)",
        ),
        (
            {"sampler": keras_hub.samplers.TopKSampler(k=2)},
            r"samples of the model itself.* TopKSampler\(temperature=1.0\)",
        ),
        (
            {"end_token_ids": (7,)},
            r"ends responses with \(7,\), the data with .1,",
        ),
        ({"max_new_tokens": 7}, "up to 7 tokens, more .*max_response_length=6"),
        ({"bucket_lengths": (2,)}, "prompts are too long: .* the limit is 2"),
    ],
)
def test_other_options_of_the_engine_are_refused(options, message, finished):
    options = {"end_token_ids": (END,), "max_new_tokens": 6, **options}
    engine = KerasEngine(make_causal_lm(num_layers=1), **options)
    with pytest.raises(ValueError, match=message):
        make_self_play(finished, engine=engine)


def test_other_frozen_weights_are_refused(tmp_path):
    def start(value):
        model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
        frozen = model.causal_lm.backbone.get_layer("token_embedding")
        frozen.embeddings.assign(np.full(frozen.embeddings.shape, value))
        frozen.trainable = False
        model.compile(loss=keras_iris.losses.IRIS())
        return keras_iris.SelfPlay(
            model, make_examples(), tmp_path / "run", batch_size=8
        )

    start(0.5).folder.write_manifest()
    start(0.5)
    with pytest.raises(ValueError, match="frozen_weights"):
        start(0.25)


def test_epochs_count_on_and_every_step_has_its_own_loss(tmp_path):
    class Recorder(keras.callbacks.Callback):
        epochs, losses = [], []

        def on_epoch_begin(self, epoch, logs=None):
            self.epochs.append(epoch)

        def on_train_batch_begin(self, batch, logs=None):
            self.losses.append(0.0)

        def on_train_batch_end(self, batch, logs=None):
            # Keras logs the mean over the epoch so far.
            earlier = sum(self.losses[-batch - 1 : -1])
            self.losses[-1] = logs["loss"] * (batch + 1) - earlier

    make_self_play(tmp_path / "run", callbacks=Recorder()).run()
    assert Recorder.epochs == [0, 1, 2, 3]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [
        line["loss"]
        for line in map(json.loads, lines)
        if line["kind"] == "step"
    ]
    np.testing.assert_allclose(logged, Recorder.losses, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="which compiles nothing"
)
def test_later_iterations_compile_nothing(tmp_path, monkeypatch):
    traces = []
    call = keras_iris.SelfPlayModel.call

    def counted(self, inputs, training=None):
        traces.append(inputs["token_ids"].shape)
        return call(self, inputs, training=training)

    monkeypatch.setattr(keras_iris.SelfPlayModel, "call", counted)
    self_play = make_self_play(
        tmp_path / "run",
        iterations=3,
        evaluate=lambda model: {"traces": len(traces)},
    )
    assert len(self_play.bucket_lengths) <= 5
    self_play.run()
    lines = keras_iris.evaluation.read_metrics(tmp_path / "run")
    counts = [x["traces"] for x in lines if x["kind"] == "evaluation"]
    assert 0 < counts[1] == counts[2] == counts[3]


def test_checkpoint_by_time(tmp_path, monkeypatch):
    """With no time between them, the epoch's first step has one."""
    self_play = make_self_play(
        tmp_path / "run",
        checkpoint_every_steps=None,
        checkpoint_every_minutes=1e-9,
    )
    with monkeypatch.context() as patch:
        _kill_at_write(patch, 9)
        with pytest.raises(_Killed):
            self_play.run()
    _, metadata = read_arrays(tmp_path / "run" / "checkpoint.safetensors")
    assert json.loads(metadata["position"])["batch"] == 1


class _OtherProcess:
    """Stands in for an engine that has weights of its own."""

    needs_folder = True

    def __init__(self):
        self.folders = []

    def update(self, folder):
        assert (folder / "model.safetensors").is_file()
        self.folders.append(folder)

    def get_config(self):
        return {}

    def generate(self, prompts, *, seed):
        return [Completion((3, END), "stop") for _ in prompts]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda prompts: None, "10 prompts. Received: None"),
        (lambda prompts: [], r"10 prompts. Received: \[\]"),
        (
            lambda prompts: [Completion((END,), "stop")] * 11,
            r"10 prompts. Received: \[Completion",
        ),
        (lambda prompts: [(3, END)] * 10, r"Received: \[\(3, 1\), "),
        (
            lambda prompts: [Completion((VOCABULARY_SIZE,), "stop")] * 10,
            rf"vocabulary. Received: \({VOCABULARY_SIZE},\)",
        ),
        (
            lambda prompts: [Completion((), "stop")] * 10,
            r"Completion 0 of Engine .* Received: \(\)",
        ),
        (
            lambda prompts: [Completion((3,) * 7, "length")] * 10,
            "Completion 0 of Engine has 7 tokens, more than max_resp.*=6",
        ),
    ],
    ids=["None", "none", "many", "ids", "unknown id", "no id", "long"],
)
def test_what_an_engine_may_not_answer(answer, message, tmp_path):
    class Engine(_OtherProcess):
        needs_folder = False

        def generate(self, prompts, *, seed):
            return answer(prompts)

    self_play = make_self_play(tmp_path / "run", engine=Engine())
    with pytest.raises(ValueError, match=message):
        self_play.run()


def test_what_is_no_engine(tmp_path):
    class OnlyGenerates:
        generate = _OtherProcess.generate

    for engine in (OnlyGenerates(), _OtherProcess):
        with pytest.raises(ValueError, match="`engine` has to be a `keras_"):
            make_self_play(tmp_path, engine=engine)


@pytest.mark.parametrize(
    "scores", [None, {"step": 1.0}, {"kind": 1.0}, {"score": [1.0, 2.0]}]
)
def test_what_evaluate_may_not_return(scores, tmp_path):
    self_play = make_self_play(tmp_path / "run", evaluate=lambda model: scores)
    with pytest.raises(ValueError) as error:
        self_play.run()
    assert str(error.value) == (
        "`evaluate` has to return a dictionary of numbers, of other names "
        "than ['iteration', 'kind', 'seconds', 'step']. "
        f"Received: {scores!r}"
    )


def test_engine_with_weights_of_its_own_gets_each_iteration(tmp_path):
    engine = _OtherProcess()
    self_play = make_self_play(tmp_path / "run", engine=engine, epochs=1)
    with pytest.warns(match="_OtherProcess gives no log-probs"):
        self_play.run()
    assert engine.folders == [tmp_path / "run" / "export"] * 2


class _FromModel(_OtherProcess):
    """Gives the model's own log-probs, plus an error of each token."""

    def __init__(self, causal_lm, errors):
        super().__init__()
        self.causal_lm, self.errors = causal_lm, np.array(errors, "float32")

    def generate(self, prompts, *, seed):
        completions = []
        for prompt in prompts:
            ids = np.array([[*prompt, 3, END, 0, 0, 0, 0, 0]])[:, :8]
            mask = np.arange(8)[None] < len(prompt) + 2
            logits = self.causal_lm({"token_ids": ids, "padding_mask": mask})
            table = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
            start = len(prompt) - 1
            log_probs = table[0, [start, start + 1], [3, END]] + self.errors
            completions.append(Completion((3, END), "stop", log_probs))
        return completions


def test_engine_and_trainer_are_compared_token_by_token(tmp_path):
    self_play = make_self_play(tmp_path / "run", engine=_OtherProcess())
    causal_lm = self_play.model.causal_lm
    for errors, is_right in (([0.0, 0.0], True), ([0.1, -0.1], False)):
        opponent = self_play.opponent
        opponent.engine = _FromModel(causal_lm, errors)
        if is_right:
            opponent.play(1, "a key", is_over=False)
        else:
            with pytest.raises(ValueError, match="0.1 nats per token"):
                opponent.play(2, "a key", is_over=False)


def test_int8_and_exported_weights(tmp_path):
    causal_lm = make_causal_lm(num_layers=1, hidden_dim=64)
    causal_lm.quantize(
        "int8", filters=lambda x: isinstance(x, keras.layers.EinsumDense)
    )
    causal_lm.backbone.enable_lora(2)
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(loss=keras_iris.losses.IRIS())
    with pytest.raises(ValueError, match="_OtherProcess reads exported.*int8"):
        keras_iris.SelfPlay(
            model,
            make_examples(),
            tmp_path,
            batch_size=8,
            engine=_OtherProcess(),
        )


def test_a_template_that_drops_the_response(tmp_path):
    template = ChatTemplate(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    tokenizer = SymbolTokenizer(["a", "b"])
    with pytest.raises(ValueError, match="template"):
        make_self_play(
            tmp_path,
            examples=[{"prompt": "a", "response": "b"}] * 8,
            tokenizer=tokenizer,
            template=template,
        )


def test_nan_stops_training_with_the_ids_and_keeps_the_checkpoint(tmp_path):
    self_play = make_self_play(
        tmp_path / "run", learning_rate=1e30, checkpoint_every_steps=1
    )
    with pytest.raises(FloatingPointError, match=r"examples \[[\d, ]+\]"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self_play.run()
    for array in final_arrays(tmp_path / "run").values():
        assert np.isfinite(array.astype("float64")).all()


def test_nan_in_the_opponent(tmp_path):
    self_play = make_self_play(tmp_path / "run")
    variable = self_play.model.trainable_variables[-1]
    variable.assign(np.full(variable.shape, np.nan, "float32"))
    with pytest.raises(
        FloatingPointError, match="is not finite. What .* is of before"
    ):
        self_play.run()


def test_too_long_responses_of_text(tmp_path):
    tokenizer = SymbolTokenizer(["a", "b", "c"])
    rows = [{"prompt": "a", "response": "b c b c b"}] * 8
    options = dict(examples=rows, tokenizer=tokenizer, max_response_length=3)
    with pytest.raises(ValueError, match="8 of 8 .*3"):
        make_self_play(tmp_path, on_overflow="error", **options)
    with pytest.warns(UserWarning, match="8 of 8 .* were cut"):
        self_play = make_self_play(tmp_path, on_overflow="truncate", **options)
    b, c = tokenizer.encode("b c")
    for example in self_play.examples:
        assert example.response_ids.tolist() == [b, c, b]


class TestErrors:
    def test_not_compiled(self, tmp_path):
        model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
        with pytest.raises(ValueError, match="compiled with a loss"):
            keras_iris.SelfPlay(model, make_examples(), tmp_path)

    def test_fewer_rows_than_a_batch(self, tmp_path):
        with pytest.raises(ValueError, match="fewer than batch_size=8"):
            make_self_play(tmp_path, examples=make_examples(3))

    def test_vocabulary(self, tmp_path):
        examples = make_examples()
        examples[0].prompt_ids[0] = VOCABULARY_SIZE
        with pytest.raises(ValueError, match="Vocabulary mismatch"):
            make_self_play(tmp_path, examples=examples)

    def test_text_without_a_tokenizer(self, tmp_path):
        rows = [{"prompt": "a", "response": "b"}] * 8
        with pytest.raises(ValueError, match="Text needs a tokenizer"):
            make_self_play(tmp_path, examples=rows)

    def test_no_common_end(self, tmp_path):
        examples = make_examples()
        examples[0].response_ids[-1] = 5
        with pytest.raises(ValueError, match="end in 2 different"):
            make_self_play(tmp_path, examples=examples)

    def test_no_data(self, tmp_path):
        with pytest.raises(ValueError, match="data are empty"):
            make_self_play(tmp_path, examples=())

    def test_negative_seed(self, tmp_path):
        with pytest.raises(ValueError, match="`seed`"):
            make_self_play(tmp_path, seed=-1)

    @pytest.mark.parametrize(
        "name", ["max_prompt_length", "checkpoint_every_steps", "epochs"]
    )
    @pytest.mark.parametrize("value", [0, 1.5, "8", True])
    def test_counts(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=f"`{name}` has .* {value!r}"):
            make_self_play(tmp_path / "run", **{name: value})
        assert not (tmp_path / "run").exists()

    def test_counts_of_numpy(self, tmp_path):
        make_self_play(
            tmp_path, batch_size=np.int64(8), seed=np.int64(1)
        ).folder.write_manifest()

    @pytest.mark.parametrize(
        "example",
        [
            {"prompt": "a", "response": "b"},
            Example(np.array([2], "int32"), np.array([], "int32")),
        ],
    )
    def test_what_is_no_example(self, example, tmp_path):
        examples = [*make_examples(), example]
        with pytest.raises(ValueError, match="Number 24 of the data"):
            make_self_play(tmp_path, examples=examples)

    def test_batches_that_cannot_be_logged(self, tmp_path):
        with pytest.raises(ValueError, match="4096 pairs at most.* 5000"):
            make_self_play(tmp_path, batch_size=5000)

    def test_steps_per_execution(self, tmp_path):
        model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
        model.compile(loss=keras_iris.losses.IRIS(), steps_per_execution=2)
        with pytest.raises(ValueError, match="steps_per_execution=1"):
            keras_iris.SelfPlay(model, make_examples(), tmp_path)

    @pytest.mark.parametrize("text", ["", "{}", "[]"])
    def test_broken_manifest(self, text, tmp_path):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="not the manifest of a run"):
            make_self_play(tmp_path)

    def test_checkpoint_without_a_manifest(self, tmp_path):
        (tmp_path / "checkpoint.safetensors").write_text("")
        with pytest.raises(ValueError, match="without its manifest"):
            make_self_play(tmp_path)

    def test_broken_checkpoint(self, tmp_path):
        self_play = make_self_play(tmp_path)
        (tmp_path / "checkpoint.safetensors").write_text("half")
        with pytest.raises(ValueError, match="Put back a whole checkpoint"):
            self_play.run()

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="can't be written to"):
            make_self_play(tmp_path / "file" / "run")

    def test_log_that_cannot_be_written(self, tmp_path):
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(ValueError, match="can't be written to"):
            make_self_play(tmp_path)


def test_replaced_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
