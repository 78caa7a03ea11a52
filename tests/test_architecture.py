"""Imports go downward only; only the backend folder knows the backend."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "keras_iris"
# A folder may import from itself and from what stands before it.
LAYERS = [
    {"arguments", "files", "start_up"},
    {"losses", "data"},
    {"metrics"},
    {"backend"},
    {"models"},
    {"callbacks", "generation", "hub", "distribution"},
    {"self_play", "run_estimate", "lm_eval"},
    {"evaluation"},
    {"cli"},
    {"__init__", "__main__"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def _folder(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path):
    """(module, line) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "keras_iris":
                for alias in node.names:
                    yield f"keras_iris.{alias.name}", node.lineno


def _layer(folder):
    return next(i for i, names in enumerate(LAYERS) if folder in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.name))
def test_imports(path):
    folder = _folder(path)
    for module, line in _imports(path):
        parts = module.split(".")
        where = f"{path.relative_to(PACKAGE)}:{line} imports {module}"
        if parts[0] in ("jax", "tensorflow", "torch"):
            assert folder == "backend", where
        if parts[:2] in (["keras", "src"], ["keras_hub", "src"]):
            assert folder in ("backend", "hub"), where
        if parts[0] == "keras_iris" and len(parts) > 1 and parts[1] != folder:
            assert _layer(parts[1]) < _layer(folder), where


def test_losses_and_metrics_know_nothing_of_language_models():
    for path in FILES:
        if _folder(path) in ("losses", "metrics"):
            assert "keras_hub" not in [m for m, _ in _imports(path)]


def test_import_is_silent():
    code = """
import sys, keras, keras_iris
# `keras.saving.load_model` finds the classes.
assert keras.saving.get_registered_object("keras_iris>SelfPlayModel")
assert keras.saving.get_registered_object("keras_iris>IRIS")
for name in keras_iris.__all__:
    getattr(keras_iris, name)
# The harness takes seconds to import.
assert "lm_eval" not in sys.modules
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == result.stderr == ""
