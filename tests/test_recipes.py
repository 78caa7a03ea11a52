"""The recipes run from end to end on tiny checkpoints of their architecture."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_checkpoints import copy, edit

import keras_iris

RECIPES = Path(__file__).parents[1] / "recipes"
NUM_ROWS = 6
TINY = {
    "--batch-size": 4,
    "--micro-batch-size": 2,
    "--iterations": 1,
    "--epochs": 1,
    "--max-length": 96,
    "--max-new-tokens": 4,
}


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe by its name, as Python does when it's a script."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


@pytest.fixture
def data(tmp_path):
    """Conversations of one length, so that there is one shape to compile."""
    file = tmp_path / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"{i} and {i}."},
            ]
        }
        for i in range(NUM_ROWS)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("name", ["zephyr_7b", "qwen2_5_3b", "smollm2_135m"])
def test_the_run_folder_follows_the_preset(name, recipe):
    module = recipe("smollm2_135m" if "smol" in name else "paper_options")
    prefix = () if "smol" in name else (None, "hf://a/zephyr")
    for preset in ("hf://org/other", "some/folder/other"):
        arguments = ["--preset", preset, "--data", "x.jsonl"]
        options = module.read_options(*prefix, arguments)
        assert options.run_dir == "runs/other"


def _base_model(checkpoint, tmp_path):
    """As Qwen2.5-3B may be: no template, and not the template's end token."""
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "tokenizer_config.json", chat_template=None)
    edit(folder / "generation_config.json", eos_token_id=632)
    return folder


def _arguments(preset, data, run_dir, *more, **changes):
    options = {"--preset": preset, "--data": data, "--run-dir": run_dir}
    options |= TINY | {f"--{name}": value for name, value in changes.items()}
    return [*map(str, sum(options.items(), ())), *more]


@pytest.mark.parametrize(
    ("name", "architecture", "more"),
    [
        ("zephyr_7b", "mistral", ()),
        ("qwen2_5_3b", "qwen2", ("--lora-rank", "2", "--objective", "spin")),
    ],
)
def test_paper_recipe(  # noqa: PLR0913
    name, architecture, more, recipe, checkpoint, data, tmp_path
):
    folder, run_dir = checkpoint(architecture), tmp_path / "run"
    if architecture == "qwen2":
        folder = _base_model(checkpoint, tmp_path)
    arguments = _arguments(
        folder, data, run_dir, *more, **{"learning-rate": 1e-3}
    )
    recipe(name).main(arguments)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    nll = [
        line["nll_per_token"]
        for line in map(json.loads, lines)
        if line["kind"] == "evaluation"
    ]
    assert np.isfinite(nll).all()
    settings = json.loads((run_dir / "manifest.json").read_text())["settings"]
    assert settings["num_examples"] == 4  # and two held out
    assert settings["loss"] == ("SPIN" if more else "IRIS")
    # What was trained is in the exported folder.
    old, new = (
        keras_iris.load(path).get_weights()
        for path in (folder, run_dir / "model")
    )
    changes = [np.abs(a - b).max() for a, b in zip(old, new, strict=True)]
    assert max(changes) > 1e-4
    assert keras_iris.load(run_dir / "model").chat_template is not None
    assert (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "architecture", "prompt"),
    [
        ("zephyr_7b", "mistral", "<|user|>\nWhat is 0 plus 0?</s> \n"),
        ("qwen2_5_3b", "qwen2", "<|im_start|>user\nWhat is 0 plus 0?<|im_end"),
    ],
)
def test_dry_run(  # noqa: PLR0913
    name, architecture, prompt, recipe, checkpoint, data, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    folder = shutil.copytree(checkpoint(architecture), tmp_path / "copy")
    (folder / "model.safetensors").unlink()  # not needed
    arguments = _arguments(folder, data, run_dir, "--dry-run")
    recipe(name).main(arguments)
    output = capsys.readouterr().out
    assert prompt in output
    for word in ("not measured", "activations", "checkpoint", "hours", "Not c"):
        assert word in output
    assert not run_dir.exists()


def test_dry_run_of_a_base_model(recipe, checkpoint, data, tmp_path, capsys):
    folder = _base_model(checkpoint, tmp_path)
    arguments = _arguments(folder, data, tmp_path / "run", "--dry-run")
    recipe("qwen2_5_3b").main(arguments)
    assert "0 and 0.<|im_end|>\n" in capsys.readouterr().out


def test_dry_run_loads_as_the_run_does(
    recipe, checkpoint, data, tmp_path, monkeypatch
):
    main = recipe("qwen2_5_3b").main
    with pytest.raises(ValueError, match="Cannot download 'a b/c'"):
        main(_arguments("hf://a b/c", data, tmp_path, "--dry-run"))
    with pytest.raises(ValueError, match="There is no folder"):
        main(_arguments(tmp_path / "none", data, tmp_path, "--dry-run"))
    copy(checkpoint("qwen2"), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    main(_arguments("~/copy", data, tmp_path / "run", "--dry-run"))


def test_dry_run_looks_at_the_vocabulary(recipe, checkpoint, data, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", vocab_size=600)
    with pytest.raises(ValueError, match="the model 600 embeddings"):
        recipe("qwen2_5_3b").main(
            _arguments(folder, data, tmp_path / "run", "--dry-run")
        )


def test_dry_run_looks_at_the_weights(recipe, checkpoint, data, tmp_path):
    folder = shutil.copytree(checkpoint("qwen2"), tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="Download"):
        recipe("qwen2_5_3b").main(
            _arguments(folder, data, tmp_path / "run", "--dry-run")
        )


def test_dry_run_looks_at_the_disk(
    recipe, checkpoint, data, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit, match="disk is too small"):
        recipe("zephyr_7b").main(
            _arguments(
                checkpoint("mistral"), data, tmp_path / "run", "--dry-run"
            )
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--engine", "server"), "needs --server-command or --server-url"),
        (
            ("--engine", "server", "--server-url", "http://a/v1"),
            "--server-url needs --update-command",
        ),
        (("--shard", "3"), "has to divide --batch-size=4"),
        (("--shard", "4"), "has to divide --micro-batch-size=2"),
        (("--max-new-tokens", "96"), "--max-length"),
        (("--objective", "dpo"), "invalid choice"),
        (("--iterations", "0"), "received '0', expected int above 0"),
        (("--batch-size", "0"), "received '0', expected int above 0"),
        (("--lora-rank", "-1"), "received '-1', expected int above 0"),
        (("--shard", "two"), "received 'two', expected int above 0"),
        (("--learning-rate", "0"), "received '0', expected float above 0"),
        (("--quantize", "int4"), "--quantize needs --lora-rank"),
        (
            "--quantize int8 --lora-rank 2 --engine server".split(),
            "int8 doesn't go with --engine server",
        ),
        (
            ("--engine", "server", "--server-command", "no/vllm {folder}"),
            "no program 'no/vllm'",
        ),
    ],
)
def test_options_that_do_not_fit(more, message, recipe, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe("zephyr_7b").main(_arguments("a", "b", tmp_path, *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_too_few_rows(recipe, checkpoint, data, tmp_path, more):
    arguments = _arguments(
        checkpoint("qwen2"), data, tmp_path / "run", *more, **{"batch-size": 5}
    )
    with pytest.raises(SystemExit, match="Expected at least 7"):
        recipe("qwen2_5_3b").main(arguments)


def test_update_command_gets_the_folder(recipe, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(
        "import pathlib, sys\n"
        f"pathlib.Path({str(tmp_path / 'seen')!r}).write_text(sys.argv[1])\n"
    )
    server = "--engine server --server-url http://127.0.0.1:1/v1".split()
    command = ["--update-command", f"{sys.executable} {script}"]
    options = recipe("paper_options").read_options(
        "", "hf://a/b", [*server, *command]
    )
    tokenizer = keras_iris.data.SymbolTokenizer(["a"])
    make_engine = recipe("paper_setting").make_engine
    engine = make_engine(options, None, tokenizer)
    assert engine.concurrency == 256
    engine.update(tmp_path / "export")
    assert (tmp_path / "seen").read_text() == str(tmp_path / "export")
    options.update_command = ["false"]
    with pytest.raises(subprocess.CalledProcessError):
        make_engine(options, None, tokenizer).update(tmp_path)


def test_a_server_to_start(recipe):
    command = f"{sys.executable} serve.py {{folder}} --port {{port}}"
    options = recipe("paper_options").read_options(
        "",
        "hf://a/b",
        ["--engine", "server", "--server-command", command]
        + "--server-devices 1,2 --concurrency 7".split(),
    )
    tokenizer = keras_iris.data.SymbolTokenizer(["a"])
    engine = recipe("paper_setting").make_engine(options, None, tokenizer)
    assert engine.command == command.split()
    assert engine.environment == {"CUDA_VISIBLE_DEVICES": "1,2"}
    assert engine.concurrency == 7


def test_rows_of_a_dataset(recipe, checkpoint, tmp_path, monkeypatch):
    import datasets

    turns = ("user", "What?"), ("assistant", "That.")
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": messages}] * 5
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: iter(rows)
    )
    arguments = _arguments(
        checkpoint("qwen2"), "a/b", tmp_path / "run", "--dry-run"
    )
    with pytest.raises(SystemExit, match="5 conversations are too few"):
        recipe("qwen2_5_3b").main(arguments)
    rows += rows
    recipe("qwen2_5_3b").main(arguments)


def test_warm_up(recipe):
    schedule = recipe("paper_setting").LinearWarmUp(5e-7, 10, 100)
    rates = [float(schedule(step)) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 5e-8 * np.arange(1, 11), rtol=1e-5)
    np.testing.assert_allclose(
        rates[10:], 5e-7 * np.arange(90, 0, -1) / 90, rtol=1e-5
    )
    config = keras.optimizers.schedules.serialize(schedule)
    again = keras.optimizers.schedules.deserialize(config)
    assert float(again(3)) == rates[3]


def test_smollm2(recipe, checkpoint, data, tmp_path, capsys, monkeypatch):  # noqa: PLR0913
    module = recipe("smollm2_135m")
    sizes = dict(NUM_HELD_OUT=2, NUM_SAMPLES=1, BATCH_SIZE=4, EPOCHS=1)
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    run_dir = tmp_path / "run"
    options = {
        "--preset": checkpoint("llama"),
        "--data": data,
        "--run-dir": run_dir,
        "--prompts": 4,
        "--iterations": 1,
    }
    module.main([*map(str, sum(options.items(), ()))])
    output = capsys.readouterr().out
    positions = [output.index(f"\n{w}:") for w in ("Prompt", "Before", "After")]
    assert positions == sorted(positions)
    assert (run_dir / "model" / "config.json").exists()
