"""pyproject.toml names what the package imports, each from a version on."""

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = metadata.packages_distributions()
# Without a promise that names stay: keras.src, keras_hub.src, jax.extend.
CHANGING = {"src", "extend"}


def _requirements(texts):
    """By name, without the package's own extras."""
    found = [Requirement(text) for text in texts]
    return {
        canonicalize_name(r.name): r for r in found if r.name != PROJECT["name"]
    }


ALWAYS = _requirements(PROJECT["dependencies"])
ALL = ALWAYS | _requirements(sum(EXTRAS.values(), []))


def _modules():
    """Names of the modules that the package imports, itself left out."""
    for path in (ROOT / "keras_iris").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module
            elif isinstance(node, ast.Call) and "import_module" in ast.dump(
                node.func
            ):
                if isinstance(node.args[0], ast.Constant):
                    yield node.args[0].value


MODULES = {
    name: {*map(canonicalize_name, DISTRIBUTIONS[name.partition(".")[0]])}
    for name in _modules()
    if name.partition(".")[0] not in {*sys.stdlib_module_names, "keras_iris"}
}


def test_what_is_imported_is_required():
    for name, distributions in MODULES.items():
        assert distributions & ALL.keys(), f"{name} is of {distributions}"


def test_what_is_required_is_imported():
    assert ALWAYS.keys() <= set().union(*MODULES.values())


def test_bounds():
    for name, requirement in ALL.items():
        assert ">=" in str(requirement.specifier), requirement
        if any(
            name in distributions and CHANGING & {*module.split(".")}
            for module, distributions in MODULES.items()
        ):
            assert "<" in str(requirement.specifier), requirement


def test_constraints_are_within_the_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in filter(lambda line: not line.startswith("#"), lines):
        name, _, version = line.partition("==")
        requirement = ALL.get(canonicalize_name(name))
        assert requirement is None or version in requirement.specifier
