"""The examples of README and docstrings run as they stand."""

import ast
import doctest
import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from tiny_checkpoints import END_IDS, VOCABULARY_SIZE, edit

import keras_iris
from keras_iris.data import Example, PairDataset

ROOT = Path(__file__).parents[1]
# Where a reader has a folder of their own, the test has this one.
FOLDER = Path("path/to/folder")
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]


def _blocks(text):
    return re.findall(r"```python\n(.*?)```", inspect.cleandoc(text), re.S)


def _docstrings():
    """(name, text) of every docstring with an example."""
    for path in sorted((ROOT / "keras_iris").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                text = ast.get_docstring(node) or ""
                if "```" in text or ">>>" in text:
                    name = getattr(node, "name", path.stem)
                    yield pytest.param(path, text, id=name)


@pytest.fixture
def names(tmp_path, monkeypatch, checkpoint):
    """What the examples take for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint("qwen2"), FOLDER)
    # The random model ends a response after about two tokens.
    ends = [*END_IDS["qwen2"], *range(VOCABULARY_SIZE // 2)]
    edit(FOLDER / "generation_config.json", eos_token_id=ends)
    rows = [
        {"prompt": f"How are you, {i}?", "response": "Fine, thanks."}
        for i in range(64)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    Path("data.jsonl").write_text(lines)
    causal_lm = keras_iris.load(FOLDER, lora_rank=16)
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(optimizer="sgd", loss=keras_iris.losses.IRIS())
    ids = np.arange(3, 9, dtype="int32")
    pairs = PairDataset(
        [Example(ids[:3], ids)] * 4,
        [ids[::-1]] * 4,
        np.full((4, 2), -40.0),
        batch_size=4,
    )
    return {
        "keras": keras,
        "keras_iris": keras_iris,
        "causal_lm": causal_lm,
        "model": model,
        "tokenizer": causal_lm.tokenizer,
        "preset": FOLDER,
        "messages": [{"role": "user", "content": "Hello"}],
        "pairs": pairs,
        "inputs": pairs[0][0],
    }


@pytest.mark.parametrize(("path", "text"), list(_docstrings()))
def test_docstring(path, text, names):
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts))
    example = doctest.DocTestParser().get_doctest(
        text, {**names, **vars(module)}, path.stem, str(path), 0
    )
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0
    for block in _blocks(text):
        exec(block, {**vars(module), **names})
        result = doctest.TestResults(0, result.attempted + 1)
    assert result.attempted


def test_readme(names):
    """All blocks, one after another."""
    blocks = _blocks((ROOT / "README.md").read_text())
    assert "SelfPlayModel" in blocks[0]
    for block in blocks:
        exec(block, names)
    assert np.isfinite(names["model"].history.history["loss"]).all()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    file = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", file.read_text())
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing


def test_every_folder_has_its_line():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    listed = {
        folder.rstrip("/") for folder in re.findall(r"^\| `(.+?)`", text, re.M)
    }
    package = {
        f"keras_iris/{p.parent.name}"
        for p in ROOT.glob("keras_iris/*/__init__.py")
    }
    others = {"recipes", "notebooks", "benchmarks", "docs", "tests"}
    assert listed == package | others
