"""The commands of docs/cli.md as they stand, and what is wrong in one line."""

import functools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import keras
import numpy as np
import pytest
import transformers
import yaml
from lm_eval.tasks import TaskManager
from tiny_checkpoints import END_IDS, VOCABULARY_SIZE, edit

import keras_iris
from keras_iris.cli import doctor, main, start
from keras_iris.cli.config import build, read_config
from keras_iris.cli.model import _check_tasks
from keras_iris.lm_eval import evaluate

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/smollm2_135m.yaml"
FOLDER, RUN = "path/to/folder", "runs/smollm2"
NUM_ROWS = 64
# Minutes of training, which `test_quickstart` runs.
SLOW = "keras-iris quickstart --small"
COMMANDS = [
    line
    for block in re.findall(
        r"```sh\n(.*?)```", (ROOT / "docs/cli.md").read_text(), re.S
    )
    for line in block.splitlines()
]
TASK = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": ["red", "blue"],
    "doc_to_target": 0,
}


class Answer:
    """What a command printed, and its exit status."""

    def __init__(self, capsys, *words):
        self.status = main([*map(str, words)])
        self.out, self.err = capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """Where a reader of docs/cli.md is: a model, data, recipes and tasks."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(checkpoint("qwen2"), folder / FOLDER)
    # The random model ends a response after about two tokens.
    ends = [*END_IDS["qwen2"], *range(VOCABULARY_SIZE // 2)]
    edit(folder / FOLDER / "generation_config.json", eos_token_id=ends)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    rows = [
        {"prompt": f"How are you, {i}?", "response": "Fine, thanks."}
        for i in range(NUM_ROWS)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    data_files = {"test": str(folder / "data.jsonl")}
    task = {**TASK, "dataset_kwargs": {"data_files": data_files}}
    (folder / "tasks/colours.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def outputs(folder):
    """What each command of docs/cli.md printed, in their order."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        for command in COMMANDS:
            if command == SLOW:
                continue
            name, *words = shlex.split(command)
            assert name == "keras-iris"
            with pytest.MonkeyPatch.context() as inner:
                lines = []
                inner.setattr(
                    "builtins.print",
                    lambda *a, lines=lines, **_: lines.append(a),
                )
                assert main(words) == 0, lines
            found[command] = "\n".join(str(a[0]) for a in lines if a)
    return found


@pytest.fixture
def cli(capsys, folder, monkeypatch):
    monkeypatch.chdir(folder)
    return lambda *words: Answer(capsys, *words)


def _of(outputs, name):
    return [out for c, out in outputs.items() if c.split()[1] == name]


def test_every_command_is_documented():
    from keras_iris.cli import app

    names = {c.callback.__name__ for c in app.registered_commands}
    assert {command.split()[1] for command in COMMANDS} == names


def test_run_is_the_program(outputs, folder, monkeypatch):
    """The same arguments in Python, where the recipe's numbers are again."""
    monkeypatch.chdir(folder)
    keras.utils.set_random_seed(0)
    causal_lm = keras_iris.load(FOLDER, lora_rank=16)
    rows = keras_iris.data.load_dataset("data.jsonl", num_prompts=544)
    held_out, train = (
        keras_iris.data.tokenize(
            part,
            causal_lm.tokenizer,
            template=causal_lm.chat_template,
            max_prompt_length=64,
            max_response_length=32,
        )
        for part in (rows[:32], rows[32:])
    )
    model = keras_iris.SelfPlayModel(causal_lm)
    schedule = keras.optimizers.schedules.CosineDecay(3e-4, 3 * 2 * 2)
    model.compile(
        keras.optimizers.AdamW(schedule), loss=keras_iris.losses.IRIS()
    )
    keras_iris.SelfPlay(
        model,
        train,
        "runs/program",
        iterations=3,
        epochs=2,
        batch_size=16,
        max_prompt_length=64,
        max_response_length=32,
        callbacks=[keras_iris.callbacks.AlphaScheduler()],
        evaluate=keras_iris.evaluation.HeldOut(
            held_out, batch_size=16, samples=0
        ),
    ).run()
    manifests = [
        json.loads((folder / "runs" / name / "manifest.json").read_text())
        for name in ("smollm2", "program")
    ]
    assert manifests[0]["settings"] == manifests[1]["settings"]
    evaluations = [
        [
            line["nll_per_token"]
            for line in keras_iris.evaluation.read_metrics(run_dir)
            if line["kind"] == "evaluation"
        ]
        for run_dir in (RUN, "runs/program")
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 4
    assert "keras-iris export" in _of(outputs, "run")[0]


def test_estimate(outputs, folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected = keras_iris.estimate(
        FOLDER,
        keras_iris.data.load_dataset("data.jsonl", num_prompts=544),
        lora_rank=16,
        num_prompts=NUM_ROWS,
        iterations=3,
        epochs=2,
        micro_batch_size=16,
        max_prompt_length=64,
        max_response_length=32,
        new_tokens=32,
        optimizer_slots=2,  # of AdamW
    )
    assert _of(outputs, "estimate") == [str(expected)]


def test_export(outputs, cli, folder):
    """The latest weights score as the run ended, the best as it began."""
    rows = json.loads(cli("run", f"{RUN}/config.yaml", "--json").out)
    scores = rows["scores"]["this run"]["nll_per_token"]
    best = json.loads(
        cli(
            "export", RUN, "--out", "b", "--best", "--dtype=float32", "--json"
        ).out
    )
    latest = cli("export", RUN, "--out", "l", "--dtype=float32").out.strip()
    found = [_nll(path) for path in (latest, best["model"])]
    assert found == pytest.approx([scores["3"], min(scores.values())], abs=1e-5)
    # The best of these weights is the first: nothing was learnt by then.
    config = folder / "other.yaml"
    config.write_text(
        "{load: {preset: b}, compile: {loss: IRIS}, "
        "self_play: {data: a, run_dir: b}}"
    )
    answer = cli("export", RUN, "--out", "c", "--config", config)
    assert answer.status == 2 and "other weights than those of b" in answer.err
    (folder / "empty").mkdir(exist_ok=True)
    answer = cli("export", "empty", "--out", "c")
    assert "Pass --config FILE.yaml" in answer.err


def _nll(path):
    causal_lm = keras_iris.load(path)
    rows = keras_iris.data.load_dataset("data.jsonl", num_prompts=544)
    examples = keras_iris.data.tokenize(
        rows[:32],
        causal_lm.tokenizer,
        template=causal_lm.chat_template,
        max_prompt_length=64,
        max_response_length=32,
    )
    model = keras_iris.SelfPlayModel(causal_lm)
    held_out = keras_iris.evaluation.HeldOut(examples, batch_size=16, samples=0)
    return float(held_out(model)["nll_per_token"])


def test_samples_and_report(outputs, cli, folder):
    (text,) = _of(outputs, "samples")
    rows = json.loads(cli("samples", RUN, "--json").out)
    assert len(rows) == 4 and rows[0]["annotated"] in text
    assert list(rows[0]) == [
        *("prompt", "annotated", "before", "iteration 1", "iteration 2"),
        "iteration 3",
    ]
    report = {"report": f"{RUN}/report.html"}
    assert json.loads(cli("report", RUN, "--json").out) == report


def test_generate(outputs, cli, folder, monkeypatch):
    """Greedy answers are transformers'."""
    one, many = _of(outputs, "generate")
    assert json.loads(one).keys() == {"prompt", "response", "finish_reason"}
    assert len(many.splitlines()) == NUM_ROWS
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    prompts = ["Hello there", "What is it?", "And you?"]
    (folder / "prompts.txt").write_text("What is it?\n\nAnd you?\n")
    words = ["--preset", FOLDER, "--max-new-tokens", 4, "--temperature", 0]
    words += ["--file", "prompts.txt", "--json", "Hello there"]
    rows = json.loads(cli("generate", *words).out)
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        message = [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(
            message,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert row["response"] == expected


def test_evaluate(outputs, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (table,) = _of(outputs, "evaluate")
    found = re.search(r"colours.*?\|acc +\|[^|]*\| *([\d.]+)\|", table)
    expected = evaluate(
        keras_iris.load("model"),
        [yaml.safe_load(Path("tasks/colours.yaml").read_text())],
        limit=2,
        task_manager=TaskManager(include_defaults=False),
    )
    assert float(found[1]) == expected["results"]["colours"]["acc,none"]


# --- what is wrong


def test_all_that_is_wrong_is_told_at_once(cli, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        """
load: {lora_rnk: 2, remat: 3}
compile:
  loss: {class_name: IRSI}
  micro_batch_size: four
self_play:
  data: {nam: data.jsonl}
  run_dir: runs/x
  callbacks: [{class_name: EarlyStopping, config: {patiense: 2}}]
  engine: {class_name: AdamW}
  evaluate: {class_name: HeldOut, config: {samples: 2}}
selfplay: {}
"""
    )
    answer = cli("run", file)
    assert answer.status == 2 and answer.out == ""
    assert answer.err.splitlines() == [
        f"error: {file} can't be run:",
        "  The configuration: 'selfplay' isn't known. Did you mean self_play?",
        "  load: 'lora_rnk' isn't known. Did you mean lora_rank?",
        "  load.preset is missing.",
        "  load.remat has to be bool. Received: 3",
        "  compile.loss.class_name: 'IRSI' isn't known. Did you mean IRIS?",
        "  compile.micro_batch_size has to be int | None. Received: 'four'",
        "  self_play.data: 'nam' isn't known. Did you mean name?",
        "  self_play.data.name is missing.",
        "  self_play.callbacks[0].config: 'patiense' isn't known. Did you mean "
        "patience?",
        "  self_play.engine has to be Engine | None. Received: {'class_name': "
        "'AdamW'}",
        "  self_play.evaluate.config.examples is missing.",
    ]
    assert not Path("runs/x").exists()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("self_play.batch_size=0", "`batch_size` has to be an integer"),
        ("self_play.batch_size", "--set section.name=value"),
        ("compile.loss.config.alpha=500", "`alpha` has to be a number"),
        ("compile.optimizer.config.learning_rate=x", "`learning_rate` should"),
        ("self_play.evaluate.config.examples=99", "99 examples can't be held"),
        ("compile.loss=SPINN", "'SPINN' isn't known. Did you mean SPIN?"),
        ("self_play.control=sgd", "`control` has to be one of"),
        ("self_play.template=[", "can't be read as YAML"),
        ("load.default_template=zefyr", "zephyr"),
        ("compile.metrics=[Foo]", "metric identifier: Foo"),
        ("compile.jit_compile=maybe", "`jit_compile` has to be True, False"),
        ("self_play.data=nothing.jsonl", "There is no file nothing.jsonl"),
    ],
)
def test_bad_setting(setting, error, cli, monkeypatch):
    """Before the model is loaded."""

    @functools.wraps(keras_iris.load)
    def load(*_, **__):
        raise AssertionError("it is loaded")

    monkeypatch.setattr(keras_iris, "load", load)
    words = ["--set", f"load.preset={FOLDER}", "--set", setting]
    answer = cli("run", RECIPE, *words)
    assert answer.status == 2
    assert answer.err.startswith("error: ") and error in answer.err
    if "self_play.evaluate" not in setting:  # which needs the data
        assert cli("estimate", RECIPE, *words).err == answer.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["repot"], "No such command 'repot'. Did you mean 'report'"),
        (["report"], "Missing argument 'RUN'"),
        (["report", "none"], "Expected a run's folder"),
        (["run", "none.yaml"], "No such file"),
        (["generate", "--preset", "none", "x"], "There is no folder 'none'"),
        (["generate", "--preset", FOLDER], "No prompts came"),
    ],
)
def test_bad_words(words, error, cli):
    answer = cli(*words)
    assert answer.status == 2 and answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("error: ") and error in line


def test_without_the_harness(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "keras_iris[eval]" in cli("evaluate", "--preset", FOLDER).err


def test_unknown_task():
    with pytest.raises(ValueError, match="no task 'gsm9k'.*'gsm8k'"):
        _check_tasks(["hellaswag", "gsm9k"], ["hellaswag", "gsm8k"])
    for name in ("", "README.md", "."):
        with pytest.raises(ValueError, match="There is no task"):
            _check_tasks([name], ["hellaswag"])


def test_out_of_memory(cli, monkeypatch):
    """The advice, and no traceback."""

    def run(self):
        raise MemoryError("Compile the model with micro_batch_size=4")

    monkeypatch.setattr(keras_iris.SelfPlay, "run", run)
    words = ["--set", f"load.preset={FOLDER}", "--set", "self_play.run_dir=m"]
    answer = cli("run", RECIPE, *words)
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == (
        "error: Compile the model with micro_batch_size=4"
    )


def test_damaged_files(tmp_path):
    """Whatever is in a file, it is read or refused."""
    file, text = tmp_path / "c.yaml", RECIPE.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(text)
        for _ in range(generator.randint(1, 20)):
            place = generator.randrange(len(damaged))
            if generator.random() < 0.5:
                damaged[place] = generator.randrange(256)
            else:
                del damaged[place : place + generator.randint(1, 9)]
        file.write_bytes(damaged)
        try:
            read_config(file)
        except ValueError:
            refused += 1
    assert refused > 100
    for text in ("[" * 5000, "a: &x [*x]", "a: 2024-99-01", "- 1", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match="c.yaml"):
            read_config(file)


def test_values(tmp_path):
    settings = [
        "compile.optimizer.config.learning_rate.config.warmup_steps=10%",
        "compile.optimizer.config.weight_decay=1e-3",
        "load.default_template=chatml",
        "self_play.control={class_name: SPIF}",
    ]
    sections = read_config(RECIPE, settings).sections
    compiled = build(sections["compile"], {"num_steps": 50})
    optimizer = compiled["optimizer"]
    assert optimizer.weight_decay == 1e-3
    schedule = optimizer.get_config()["learning_rate"]["config"]
    assert (schedule["decay_steps"], schedule["warmup_steps"]) == (50, 5)
    assert type(compiled["loss"]) is keras_iris.losses.IRIS
    assert sections["load"]["default_template"].source
    play = build({"control": sections["self_play"]["control"]}, {})
    assert type(play["control"]) is keras_iris.losses.SPIF


def test_doctor(cli, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(
        doctor.metadata,
        "version",
        lambda name: "4.0.0" if name == "keras" else version(name),
    )
    answer = cli("doctor", "--json")
    assert answer.status == 1
    (problem,) = json.loads(answer.out)["problems"]
    assert problem.startswith("keras 4.0.0") and "<3.16" in problem


# --- processes


def _python(*words, **variables):
    return subprocess.run(
        [sys.executable, *words],
        env={
            "PYTHONPATH": str(ROOT),
            "PATH": os.environ["PATH"],
            **variables,
        },
        capture_output=True,
        text=True,
    )


def test_help_does_not_wait_for_keras():
    code = """
import sys
from keras_iris.cli import app, main
main([])
for command in app.registered_commands:
    main([command.callback.__name__, "--help"])
print(sorted({"keras", "tensorflow", "jax", "torch", "numpy"} & {*sys.modules}))
"""
    result = _python("-c", code)
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "[]"


def test_only_commands_speak():
    """None of TensorFlow's lines, whatever the variables."""
    result = _python("-m", "keras_iris", "doctor", KERAS_BACKEND="jax")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1] == "All is well."


def test_small_quickstart_has_names_of_the_recipe():
    text = start._find_recipe().read_text()
    for name in start._SMALL:
        assert re.search(rf"^{name} = ", text, re.M)


@pytest.mark.slow
def test_quickstart(cli):
    data = json.loads(cli(*SLOW.split()[1:], "--json").out)
    assert Path(data["report"]).exists()
    assert np.isfinite(data["scores"]["control"]["nll_per_token"]["1"])
    lines = keras_iris.evaluation.read_metrics(data["run_dir"])
    first = next(line for line in lines if line["kind"] == "step")
    assert first["gap"] > 0 and first["alpha"] > 1


def test_a_section_without_a_value(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("compile:\n")
    with pytest.raises(ValueError, match="compile has to be arguments by name"):
        read_config(file)
