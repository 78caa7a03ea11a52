"""The recipes run from end to end on tiny checkpoints of their architecture."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from programs import environment
from tiny_checkpoints import copy, edit

import keras_iris

RECIPES = Path(__file__).parents[1] / "recipes"
NUM_ROWS = 6
TINY = {
    "--batch-size": 4,
    "--micro-batch-size": 2,
    "--held-out": 2,
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
                {"role": "user", "content": "And again?"},
                {"role": "assistant", "content": "Not a first answer."},
            ]
        }
        for i in range(NUM_ROWS)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def _base_model(checkpoint, tmp_path):
    """No template, and not the template's end token."""
    folder = copy(checkpoint("qwen2"), tmp_path)
    edit(folder / "tokenizer_config.json", chat_template=None)
    edit(folder / "generation_config.json", eos_token_id=632)
    return folder


def _arguments(preset, data, run_dir, *more, **changes):
    options = {"--preset": preset, "--data": data, "--run-dir": run_dir}
    options |= TINY | {f"--{name}": value for name, value in changes.items()}
    return [*map(str, sum(options.items(), ())), *more]


def _read_nll(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        line["nll_per_token"]
        for line in map(json.loads, lines)
        if line["kind"] == "evaluation"
    ]


@pytest.mark.parametrize(
    ("name", "architecture", "more"),
    [
        ("zephyr_7b", "mistral", ("--num-samples", "2")),
        ("qwen2_5_3b", "qwen2", ("--lora-rank", "2")),
    ],
)
def test_paper_recipe(  # noqa: PLR0913
    name, architecture, more, recipe, checkpoint, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(architecture)
    run_dir = tmp_path / "run"
    if architecture == "qwen2":
        folder = _base_model(checkpoint, tmp_path)
        run_dir = tmp_path / "runs" / folder.name  # by default
    arguments = _arguments(
        folder, data, run_dir, *more, **{"learning-rate": 1e-3}
    )
    if architecture == "qwen2":
        place = arguments.index("--run-dir")
        del arguments[place : place + 2]
    recipe(name).main(arguments)
    nll = _read_nll(run_dir)
    assert len(nll) == 2
    assert np.isfinite(nll).all()
    settings = json.loads((run_dir / "manifest.json").read_text())["settings"]
    assert settings["num_examples"] == 4  # and two held out
    assert settings["num_samples"] == (2 if name == "zephyr_7b" else 1)
    # What was trained is in the exported folder.
    old, new = (
        keras_iris.load(path).get_weights()
        for path in (folder, run_dir / "model")
    )
    changes = [np.abs(a - b).max() for a, b in zip(old, new, strict=True)]
    assert max(changes) > 1e-4
    assert keras_iris.load(run_dir / "model").chat_template is not None
    assert (run_dir / "report.html").exists()


def test_the_quickstart_keeps_sft_by_its_settings(recipe, monkeypatch):
    quickstart = recipe("quickstart")
    names = {quickstart.sft_file()}
    for setting in ("POOL_SIZE", "SFT_EPOCHS", "SFT_LEARNING_RATE"):
        monkeypatch.setattr(quickstart, setting, 99)
        names.add(quickstart.sft_file())
    assert len(names) == 4


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize(
    ("name", "architecture", "mesh", "strategy"),
    [
        ("zephyr_7b", "mistral", "data=2", "fsdp"),
        ("qwen2_5_3b", "qwen2", "data=2,model=2", "2d"),
    ],
)
def test_sharded_recipe(  # noqa: PLR0913
    name, architecture, mesh, strategy, recipe, checkpoint, data, tmp_path
):
    folder = checkpoint(architecture)
    recipe(name).main(_arguments(folder, data, tmp_path / "one"))
    run_dir = tmp_path / "many"
    arguments = _arguments(folder, data, run_dir, mesh=mesh, strategy=strategy)
    subprocess.run(
        [sys.executable, str(RECIPES / f"{name}.py"), *arguments],
        env=environment(num_devices=4),
        check=True,
    )
    # Products are rounded to bfloat16.
    np.testing.assert_allclose(
        _read_nll(run_dir), _read_nll(tmp_path / "one"), rtol=1e-2
    )
    assert (run_dir / "model" / "model.safetensors").exists()
    assert (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "architecture", "prompt"),
    [
        ("zephyr_7b", "mistral", r"<\|user\|>\nWhat is \d plus \d\?</s> \n"),
        (
            "qwen2_5_3b",
            "qwen2",
            r"<\|im_start\|>user\nWhat is \d plus \d\?<\|im_end",
        ),
    ],
)
def test_dry_run(  # noqa: PLR0913
    name, architecture, prompt, recipe, checkpoint, data, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    folder = shutil.copytree(checkpoint(architecture), tmp_path / "copy")
    (folder / "model.safetensors").unlink()  # not needed
    recipe(name).main(_arguments(folder, data, run_dir, "--dry-run"))
    output = capsys.readouterr().out
    assert re.search(prompt, output)  # rows are drawn
    for word in ("activations", "checkpoints", "hours"):
        assert word in output
    assert "Not a first answer" not in output
    assert not run_dir.exists()


def test_dry_run_of_a_base_model(recipe, checkpoint, data, tmp_path, capsys):
    folder = _base_model(checkpoint, tmp_path)
    recipe("qwen2_5_3b").main(
        _arguments(folder, data, tmp_path / "run", "--dry-run")
    )
    assert re.search(r"\d and \d\.<\|im_end\|>", capsys.readouterr().out)


def test_dry_run_loads_as_the_run_does(
    recipe, checkpoint, data, tmp_path, monkeypatch
):
    main = recipe("qwen2_5_3b").main
    with pytest.raises(ValueError, match="Cannot download 'a b/c'"):
        main(_arguments("hf://a b/c", data, tmp_path, "--dry-run"))
    with pytest.raises(ValueError, match="There is no folder"):
        main(_arguments(tmp_path / "none", data, tmp_path, "--dry-run"))
    folder = copy(checkpoint("qwen2"), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    main(_arguments("~/copy", data, tmp_path / "run", "--dry-run"))
    edit(folder / "config.json", vocab_size=600)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="the model 600 embeddings"):
        main(_arguments(folder, data, tmp_path / "run", "--dry-run"))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mesh": "8"}, "argument --mesh"),
        ({"mesh": "data=8", "strategy": "3d"}, "argument --strategy"),
        ({"quantize": "int8"}, "--quantize is for .*--lora-rank"),
    ],
)
@pytest.mark.parametrize("name", ["zephyr_7b", "qwen2_5_3b"])
def test_options_that_do_not_fit(name, options, error, recipe, capsys):
    with pytest.raises(SystemExit):
        recipe(name).main(_arguments("none", "none", "none", **options))
    assert re.search(error, capsys.readouterr().err)


@pytest.mark.parametrize("batch_size", [5, 50])
def test_too_few_rows(batch_size, recipe, checkpoint, data, tmp_path):
    arguments = _arguments(
        checkpoint("qwen2"),
        data,
        tmp_path / "run",
        **{"batch-size": batch_size},
    )
    with pytest.raises(
        ValueError, match=f"4 pairs, fewer than batch_size={batch_size}"
    ):
        recipe("qwen2_5_3b").main(arguments)


def test_rows_of_a_dataset(  # noqa: PLR0913
    recipe, checkpoint, tmp_path, monkeypatch, capsys
):
    import datasets

    turns = ("user", "What?"), ("assistant", "That.")
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = datasets.Dataset.from_list([{"messages": messages}] * 70)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *args, **options: (
            rows.to_iterable_dataset() if options["streaming"] else rows
        ),
    )
    recipe("qwen2_5_3b").main(
        _arguments(checkpoint("qwen2"), "a/b", tmp_path / "run", "--dry-run")
    )
    assert "What?" in capsys.readouterr().out


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
    names = ("prompt  ", "annotated  ", "before  ", "iteration 1  ")
    positions = [output.index(name) for name in names]
    assert positions == sorted(positions)
    assert (run_dir / "model" / "config.json").exists()
