"""The examples of README, docs and docstrings run as they stand."""

import ast
import json
import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from mkdocs.commands import build
from mkdocs.config import load_config
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser
from tiny_checkpoints import END_IDS, VOCABULARY_SIZE, edit

import keras_iris
from keras_iris.data import Example, PairDataset

ROOT = Path(__file__).parents[1]
# Where a reader has a folder of their own, the test has this one.
FOLDER = Path("path/to/folder")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
MODULES = sorted((ROOT / "keras_iris").rglob("*.py"))
# The first line of an example that isn't run: a reader sees it, too.
NOT_RUN = "# Not run by the tests: "
SYBIL = Sybil(
    parsers=[PythonCodeBlockParser(), DocTestParser()],
    document_types={".py": PythonDocStringDocument},
)


def _with_examples(paths, pattern):
    """The files that have some."""
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in paths
        if re.search(pattern, path.read_text(), re.M)
    ]


@pytest.fixture(scope="module")
def project(tmp_path_factory, checkpoint):
    """A folder with a model and data."""
    path = tmp_path_factory.mktemp("project")
    folder = path / FOLDER
    shutil.copytree(checkpoint("qwen2"), folder)
    # The random model ends a response after about two tokens.
    ends = [*END_IDS["qwen2"], *range(VOCABULARY_SIZE // 2)]
    edit(folder / "generation_config.json", eos_token_id=ends)
    rows = [
        {"prompt": f"How are you, {i}?", "response": "Fine, thanks."}
        for i in range(10, 74)  # of one length: less to compile
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    (path / "data.jsonl").write_text(lines)
    (path / "runs/watched").mkdir(parents=True)
    step = {"kind": "step", "iteration": 1, "step": 1, "real_ess": 0.9}
    (path / "runs/watched/metrics.jsonl").write_text(json.dumps(step))
    return path


@pytest.fixture
def names(project, monkeypatch):
    """What the examples take for granted."""
    monkeypatch.chdir(project)
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
    yield {
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
    keras.distribution.set_distribution(None)


@pytest.mark.parametrize(
    "path",
    [
        *_with_examples(PAGES, r"^```python"),
        *_with_examples(MODULES, r"^ +(```python|>>> )"),
    ],
)
def test_examples(path, names):
    """All of a file, one after another."""
    document = SYBIL.parse(path)
    document.namespace.update(names)
    for example in document.examples():
        if not str(example.parsed).startswith(NOT_RUN):
            example.evaluate()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_commands_lead_to_files(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    blocks = "".join(re.findall(r"```\n(.*?)```", text, re.S))
    targets = re.findall(r"^(?:KERAS\w+ )?make (\w[\w-]*)", blocks, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in targets if f"\n{t}:" not in makefile]
    commands = re.findall(r"\bpython ((?:\w+/)+\w+\.py)([^\n`&]*)", text)
    for file, options in commands:
        source = (ROOT / file).read_text()
        if file.startswith("benchmarks/"):
            source += (ROOT / "benchmarks/harness.py").read_text()
        for option in re.findall(r"--[a-z][a-z-]+", options):
            assert option in source, f"{file} {option}"


def test_site_has_no_link_that_leads_nowhere(tmp_path, monkeypatch):
    # Its own advertisement.
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(
        str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)
    )
    build.build(config)
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert "<h2" in pages
    # It is read offline.
    assert not re.findall(
        r"<(?:script|link)[^>]*(?:src|href)=\"?https?:", pages
    )


def test_troubleshooting_quotes_real_messages():
    strings = [
        node.value
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    text = (ROOT / "docs/howto/troubleshooting.md").read_text()
    quotes = re.findall(r"^### (.+)", text, re.M)
    quotes.remove("Out of memory")  # the backend's
    assert quotes
    assert not [q for q in quotes if not any(q in s for s in strings)]


def test_concepts_tell_what_every_value_is():
    text = (ROOT / "docs/concepts.md").read_text()
    names = [m.name for m in keras_iris.metrics.self_play_metrics()]
    assert not [name for name in names if f"`{name}`" not in text]


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
