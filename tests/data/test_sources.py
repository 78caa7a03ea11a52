import ast
import json
import pathlib

import datasets
import pytest

import keras_iris.data
from keras_iris.data import cmudict, load_dataset

ROWS = [
    {"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set in JSONL files, one a split; the cache is a fresh one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "c")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        lines = "\n".join(map(json.dumps, rows))
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


def answers(conversations):
    return [conversation.response for conversation in conversations]


ALL = [row["response"] for row in ROWS]


@pytest.mark.parametrize("streaming", [False, True])
def test_folder(folder, streaming):
    load = {"streaming": streaming}
    assert answers(load_dataset(folder, **load)) == ALL
    assert answers(load_dataset(folder, split="test", **load)) == ALL[:3]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_drawn_by_seed_without_repetition(folder, streaming):
    def draw(seed, number=8):
        return answers(
            load_dataset(
                folder, num_prompts=number, seed=seed, streaming=streaming
            )
        )

    assert len(set(draw(0))) == 8
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert sorted(draw(0, number=99)) == sorted(ALL)


def test_file_and_folder_draw_the_same_rows(folder):
    file = folder / "train.jsonl"
    assert answers(load_dataset(file)) == ALL
    assert load_dataset(file, num_prompts=5, seed=2) == load_dataset(
        str(folder), num_prompts=5, seed=2
    )


def test_parquet_folder(folder, tmp_path):
    other = tmp_path / "parquet"
    other.mkdir()
    table = datasets.Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Hi"},
                       {"role": "assistant", "content": a}]} for a in ALL]
    )  # fmt: skip
    table.to_parquet(other / "train-00000-of-00001.parquet")
    assert answers(load_dataset(other)) == ALL


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "nonsense"}, "has no splits. Received: split='nonsense'"),
        ({"split": "train[:9]"}, "has no splits. Received: split='train"),
        ({"streaming": True}, "`streaming=True` with one file"),
    ],
)
def test_options_that_one_file_does_not_have(folder, options, error):
    with pytest.raises(ValueError, match=error):
        load_dataset(folder / "train.jsonl", **options)


def test_one_file_is_any_training_split(folder):
    file = folder / "test.jsonl"
    assert answers(load_dataset(file, split="train_sft")) == ALL[:3]


@pytest.mark.parametrize("kind", [str, pathlib.Path])
@pytest.mark.parametrize(
    "name", ["other", "none.json", "NONE.JSONL", "./other"]
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    path = kind(name) if name.startswith(".") else kind(tmp_path / name)
    error = "There is no (dataset '.*other'|dataset '.*json'|file .*NONE.JSONL)"
    with pytest.raises(ValueError, match=error):
        load_dataset(path)


def test_home_and_upper_case(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder / "train.jsonl").rename(folder / "TRAIN.JSONL")
    assert answers(load_dataset("~/set/TRAIN.JSONL")) == ALL
    assert answers(load_dataset("~/set", split="test")) == ALL[:3]


def test_fewer_than_one_prompt(folder):
    with pytest.raises(
        ValueError, match="`num_prompts` .* at least 1. Received: 0"
    ):
        load_dataset(folder, num_prompts=0)


def test_cmudict():
    entries = cmudict()
    words = [word for word, _ in entries]
    pronunciations = dict(entries)
    assert len(words) == len(set(words)) == 126_052
    assert pronunciations["keras"[:4]] == ("K", "EH1", "R", "AH0")
    # The first of two pronunciations, and one with a comment in the file.
    assert pronunciations["abdomen"] == tuple("AE0 B D OW1 M AH0 N".split())
    assert pronunciations["aalborg"] == tuple("AO1 L B AO0 R G".split())
    phonemes = {p.rstrip("012") for _, ps in entries for p in ps}
    assert len(phonemes) == 39  # of ARPAbet, as the dictionary documents
    assert all(pronunciations.values())


def test_importing_takes_no_heavy_package():
    """They are imported inside the functions that need them."""
    folder = pathlib.Path(keras_iris.data.__file__).parent
    heavy = {"datasets", "jinja2", "pyarrow", "tokenizers", "transformers"}
    for file in folder.glob("*.py"):
        imported = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported |= {node.module.split(".")[0], node.module}
        if file.name != "template_program.py":  # which nobody imports
            assert not imported & heavy, file.name
            module = "keras_iris.data.template_program"
            assert module not in imported, file.name
