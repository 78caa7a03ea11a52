"""Damaged files: our own errors that name the file, nothing else touched.

The 10,000 damages are `slow`, the first 400 of them run by default:

    pytest tests/reliability/test_corrupted.py -m slow
"""

import importlib
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from corruption import (
    WATCHED,
    damage_bytes,
    damage_header,
    damage_json,
    damage_lines,
    try_damages,
)
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from keras_iris.cli.config import read_config
from keras_iris.data import ChatTemplate, load_dataset, read_conversations
from keras_iris.evaluation import read_metrics, report, samples, scores_table
from keras_iris.hub.checkpoint import find_weights, read_weights
from keras_iris.hub.inspect import inspect
from keras_iris.self_play.arrays import read_responses, write_arrays
from keras_iris.self_play.checkpoints import Checkpoints
from keras_iris.self_play.run_dir import RunDir

ROWS = [
    {"prompt": "Was ist 2 + 2? \U0001f642", "response": "Vier."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
     "content": "Hello \u4f60\u597d"}]},
    {"real": [{"role": "system", "content": "s"}, {"role": "user",
     "content": "q"}, {"role": "assistant", "content": "a"}], "generated": []},
    {"prompt": [{"role": "user", "content": "x"}], "completion": "y"},
]  # fmt: skip
PLACE = {"iteration": 1, "step": 4}
LINES = [
    {"kind": "evaluation", "iteration": 0, "step": 0, "seconds": 1.5,
     "nll": 0.5},
    *({"kind": "step", "iteration": 1, "step": i, "loss": -0.1, "alpha": 2.0,
       "gap": 0.8, "margin": 0.5, "real_ess": 0.9} for i in range(1, 4)),
    {"kind": "alarm", **PLACE, "real_ess": 0.01},
    {"kind": "iteration", "iteration": 1, "generate_seconds": 2.0,
     "fit_seconds": 3.0, "tokens_per_second": 100.0},
    {"kind": "evaluation", **PLACE, "seconds": 1.5, "nll": 0.4},
]  # fmt: skip
MANIFEST = {
    "title": "A run",
    "created": "2026-01-01T00:00:00+0000",
    "score_modes": {"taste": "max"},
    "settings": {"data": "ab", "weights": "cd", "optimizer.beta": 0.9},
    "execution": {"iterations": 1, "device": "cpu", "callbacks": []},
    "versions": {"python": "3.11", "keras": "3.15"},
    "left": {"weights": "ef"},
    "earlier": [],
}


def _write_lines(file, lines):
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def _rows(folder, checkpoint):
    file = _write_lines(folder / "rows.jsonl", ROWS)

    def read():
        load_dataset(file, num_prompts=2)
        read_conversations(file, on_bad_row="drop")

    return file, read, (damage_bytes, damage_lines)


def _run(folder):
    """The folder of a run, as far as a report reads it."""
    _write_lines(folder / "metrics.jsonl", LINES)
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    texts = {"prompt": "p", "annotated": "a", "answer": "b"}
    answers = [
        {"iteration": i, "number": n, **texts} for i in (0, 1) for n in (0, 1)
    ]
    _write_lines(folder / "answers.jsonl", answers)
    weights = [
        {"iteration": 1, "number": n, "column": "annotated", "weight": 0.5,
         "prompt": "p", "response": "r"}
        for n in range(3)
    ]  # fmt: skip
    _write_lines(folder / "weights.jsonl", weights)
    arrays = {f"nll.{part}": np.ones(4) for part in ("values", "weights")}
    for iteration in (0, 1):
        name = f"iteration_{iteration:03d}.safetensors"
        write_arrays(folder / "evaluations" / name, arrays, {})
    return folder


def _metrics(folder, checkpoint):
    file = _run(folder) / "metrics.jsonl"

    def read():
        read_metrics(folder)
        scores_table(folder)

    return file, read, (damage_bytes, damage_lines)


def _pages(name):
    def make(folder, checkpoint):
        own = {".json": damage_json, ".jsonl": damage_lines}
        file = _run(folder) / name
        own_damage = own.get(file.suffix, damage_header)
        return file, lambda: report(folder), (damage_bytes, own_damage)

    return make


def _texts(folder, checkpoint):
    file = _run(folder) / "answers.jsonl"
    return file, lambda: samples(folder), (damage_bytes, damage_lines)


def _manifest(folder, checkpoint):
    file = _run(folder) / "manifest.json"

    def read():
        RunDir(folder).join(MANIFEST)

    return file, read, (damage_bytes, damage_json)


def _shard(folder, checkpoint):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 10).astype("int32")
    ids = rng.integers(0, 99, lengths.sum()).astype("int32")
    name = "iteration_001/synthetic"
    run, made = RunDir(folder), {"lengths": lengths, "token_ids": ids}

    def read():
        parts = run.shards(name, ["key"], size=10, make=make)
        assert parts[0].keys() == made.keys()
        for part, array in made.items():
            np.testing.assert_array_equal(parts[0][part], array)
        responses = read_responses(folder, 1, len(lengths))
        assert [len(r) for r in responses] == lengths.tolist()

    def make(numbers):
        yield from [made for _ in numbers]

    read()
    file = folder / name / "00000.safetensors"
    return file, read, (damage_bytes, damage_header)


def _shard_alone(folder, checkpoint):
    file, _, damages = _shard(folder, checkpoint)
    return file, lambda: read_responses(folder, 1, 10), damages


def _weights_of_a_run(folder, checkpoint):
    checkpoints = Checkpoints(folder)
    variables = [keras.Variable(np.ones((3, 2))), keras.Variable(1.0)]
    position = {"iteration": 1, "epoch": 0, "batch": 1}
    checkpoints.save(variables, position)
    file = folder / "checkpoint.safetensors"

    def read():
        checkpoints.weights()
        assert checkpoints.load(variables) == position

    return file, read, (damage_bytes, damage_header)


def _of_checkpoint(name, damages=(damage_bytes, damage_json)):
    """A file of a Hugging Face folder."""

    def make(folder, checkpoint):
        for file in checkpoint("qwen2").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if name == "chat_template.jinja":
            config = folder / "tokenizer_config.json"
            content = json.loads(config.read_text())
            (folder / name).write_text(content.pop("chat_template"))
            config.write_text(json.dumps(content))

        def read():
            _, tokenizer, template = inspect(folder)
            if template is not None:
                template.check(tokenizer)
            tokenizer.decode(tokenizer.encode("Hello there"))

        return folder / name, read, damages

    return make


def _template(folder, checkpoint):
    file = folder / "chat_template.jinja"
    file.write_text(ChatTemplate.named("llama3").source)

    def read():
        ChatTemplate.from_folder(folder).check()

    return file, read, (damage_bytes,)


def _index(folder, checkpoint):
    arrays = load_file(checkpoint("qwen2") / "model.safetensors")
    shapes = {name: array.shape for name, array in arrays.items()}
    names = sorted(arrays)
    files = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    for part in set(files.values()):
        there = {n: arrays[n] for n in names if files[n] == part}
        save_file(there, folder / part)
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    # What a name that leaves the folder would find.
    save_file(arrays, folder.parent / "model-0.safetensors")

    def read():
        found = find_weights(folder, shapes)
        assert {path.parent for path in found.values()} == {folder}

    def leave(content, rng):
        index = json.loads(content)
        ways = ("../", f"{folder.parent}/", "a/../../", "./", "..\\")
        name = f"{ways[rng.integers(len(ways))]}model-0.safetensors"
        index["weight_map"][names[rng.integers(len(names))]] = name
        return json.dumps(index).encode()

    return file, read, (damage_bytes, damage_json, leave)


def _yaml(folder, checkpoint):
    file = folder / "config.yaml"
    recipe = Path(__file__).parents[2] / "recipes" / "smollm2_135m.yaml"
    file.write_bytes(recipe.read_bytes())
    return file, lambda: read_config(file), (damage_bytes,)


def _arrays(folder, checkpoint):
    arrays = load_file(checkpoint("qwen2") / "model.safetensors")
    arrays = {name: a for name, a in arrays.items() if a.ndim == 1}
    shapes = {name: array.shape for name, array in arrays.items()}
    file = folder / "model.safetensors"
    save_file(arrays, file)

    def read():
        list(read_weights(find_weights(folder, shapes)))

    return file, read, (damage_bytes, damage_header)


# How to make it, how many of 100 damages it gets, what an error may say in
# place of the file's name.
WHAT = {
    "rows": (_rows, 14, ()),
    "metrics": (_metrics, 12, ()),
    "report of metrics": (_pages("metrics.jsonl"), 1, ()),
    "report of manifest": (_pages("manifest.json"), 2, ()),
    "report of weights": (_pages("weights.jsonl"), 1, ()),
    "report of examples": (
        _pages("evaluations/iteration_001.safetensors"),
        1,
        (),
    ),
    "answers": (_texts, 4, ("has no answers",)),
    "manifest": (_manifest, 10, ("holds a run with other settings",)),
    "shard": (_shard, 8, ()),
    "shard alone": (_shard_alone, 4, ()),
    "checkpoint of a run": (_weights_of_a_run, 8, ()),
    "tokenizer.json": (
        _of_checkpoint("tokenizer.json"),
        6,
        ("tokenizer", "chat template"),
    ),
    "tokenizer_config.json": (
        _of_checkpoint("tokenizer_config.json"),
        4,
        ("tokenizer", "chat template"),
    ),
    "generation_config.json": (
        _of_checkpoint("generation_config.json"),
        2,
        ("tokenizer", "chat template"),
    ),
    "chat template": (_template, 6, ("chat template",)),
    "template of a checkpoint": (
        _of_checkpoint("chat_template.jinja", (damage_bytes,)),
        2,
        ("chat template",),
    ),
    "config.json": (
        _of_checkpoint("config.json"),
        6,
        ("model.safetensors", "tokenizer has ids", "KerasHub", "end token"),
    ),
    "index": (_index, 4, ("lacks",)),
    "arrays": (_arrays, 3, ("lacks",)),
    "config.yaml": (_yaml, 2, ()),
}
assert sum(share for _, share, _ in WHAT.values()) == 100


@pytest.mark.parametrize("name", WHAT)
@pytest.mark.parametrize(
    "total", [400, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_damage(name, total, checkpoint, tmp_path, monkeypatch):
    """Plots are drawn where they show what is damaged, and not saved."""
    page = importlib.import_module("keras_iris.evaluation.report")
    monkeypatch.setattr(page, "draw", lambda panels: Figure())
    if name != "report of metrics":
        monkeypatch.setattr(page, "make_plots", lambda run: {})
    make, share, allowed = WHAT[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    file, read, damages = make(folder, checkpoint)
    read()  # whole
    place = list(WHAT).index(name)
    seeds = [(place, i) for i in range(share * total // 100)]
    with WATCHED.outside(folder) as outside:
        refused = try_damages(file, read, damages, seeds, allowed)
    assert not outside
    print(f"{name}: {refused} of {len(seeds)} refused")
    read()  # nothing that it needs was touched
