"""The notebooks run as they stand, and what is committed is what they are."""

import sys
from pathlib import Path

import nbformat
import pytest
from programs import environment

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "execute.py"})
# Put before a cell: its code is interrupted where it first calls this method.
INTERRUPT = """
import os, signal

def interrupt(self, *args, __method={method}, **kwargs):
    {method} = __method
    os.kill(os.getpid(), signal.SIGINT)
    return __method(self, *args, **kwargs)

{method} = interrupt
"""
# Called inside the first step, before it has changed anything.
METHOD = "keras.optimizers.AdamW.apply"
# All words are in the outputs that are committed.
FEWER_WORDS = {"2560": "320", "2048": "256"}
# A tiny tokenizer makes a token of each letter or two.
LONGER = {"_length=96": "_length=384", "_length=32": "_length=128"}


@pytest.fixture
def execute(monkeypatch):
    """The module that executes notebooks."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    import execute

    yield execute
    sys.modules.pop("execute")


# An alarm of the run with a real model, of which the notebook tells.
ALARM = "UserWarning: Synthetic responses have"


def _complaints(cells):
    """Errors and warnings in the outputs of cells."""
    return [
        output
        for cell in cells
        for output in cell.get("outputs", [])
        if output.output_type == "error" or output.get("name") == "stderr"
        if ALARM not in output.get("text", "")
    ]


def _has_picture(cells):
    outputs = [output for cell in cells for output in cell.outputs]
    return any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_notebook_is_its_source(source, execute):
    """With outputs, from one run from top to bottom."""
    text = source.with_suffix(".ipynb").read_text()
    assert f"{FOLDER.parent}/" not in text
    notebook = nbformat.reads(text, as_version=4)
    expected = execute.read(source)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in expected.cells
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1))
    assert not _complaints(code)
    assert _has_picture(code) or source.stem == "own_model"  # texts


def test_quickstart_runs_and_goes_on_after_an_interrupt(execute):
    notebook = _read(execute, "quickstart", FEWER_WORDS)
    client = execute.make_client(notebook)
    client.allow_errors = True
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (fit,) = [cell for cell in code if "losses.IRIS()" in cell.source]
    with client.setup_kernel():
        for cell in code:
            if cell is fit:
                _interrupt(client, cell, METHOD)
            client.execute_cell(cell, notebook.cells.index(cell))
            assert not _complaints([cell]), cell.source
    assert _has_picture(code)


@pytest.mark.once
@pytest.mark.parametrize("name", ["objective", "own_objective", "sharding"])
def test_others_run(name, execute):
    assert _has_picture(_run(execute, name))


@pytest.mark.once
def test_own_model_runs_with_a_tiny_one(execute, checkpoint, monkeypatch):
    monkeypatch.setenv("PRESET", str(checkpoint("qwen2")))
    code = _run(execute, "own_model", LONGER)
    texts = [output.get("text", "") for cell in code for output in cell.outputs]
    assert any("iteration 1" in text for text in texts)


@pytest.mark.slow
@pytest.mark.once
def test_own_model_runs(execute, monkeypatch):
    from make_smollm2 import make_smollm2

    monkeypatch.setenv("PRESET", str(make_smollm2()[0]))
    _run(execute, "own_model")


def _run(execute, name, changes=()):
    """The cells with code of a notebook that runs without complaints."""
    notebook = _read(execute, name, changes)
    execute.make_client(notebook).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not _complaints(code)
    return code


def _read(execute, name, changes):
    """A notebook with other texts in its code."""
    notebook = execute.read(FOLDER / f"{name}.py")
    for cell in notebook.cells:
        for before, after in dict(changes).items():
            if cell.cell_type == "code":
                cell.source = cell.source.replace(before, after)
    return notebook


def _interrupt(client, cell, method):
    """Executes a cell that is interrupted in a method."""
    patch = nbformat.v4.new_code_cell(INTERRUPT.format(method=method))
    client.execute_cell(patch, 0)
    assert not _complaints([patch])
    client.execute_cell(cell, 0)
    assert [o.ename for o in _complaints([cell])] == ["KeyboardInterrupt"]
