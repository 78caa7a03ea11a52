"""The public names are those of public_api.txt, and each is explained."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

import keras_iris

ROOT = Path(__file__).parents[1]
LISTED = (ROOT / "tests/public_api.txt").read_text().split()
MODULES = [
    "keras_iris",
    *(
        f"keras_iris.{name}"
        for name in keras_iris.__all__
        if isinstance(getattr(keras_iris, name), ModuleType)
    ),
    "keras_iris.lm_eval",
]
NAMES = [name for name in LISTED if name not in MODULES]


def _get(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_names_are_those_of_the_list():
    names = [
        f"{module}.{name}"
        for module in MODULES
        for name in importlib.import_module(module).__all__
    ]
    assert sorted(names) == LISTED


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_shows_no_other_names(module):
    module = importlib.import_module(module)
    shown = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert shown <= {*module.__all__}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_page(module):
    name = module.rpartition(".")[2]
    page = (ROOT / f"docs/api/{name}.md").read_text()
    assert f"::: {module}\n" in page


@pytest.mark.parametrize("name", NAMES)
def test_docstring_tells_of_arguments_and_result(name):
    thing = _get(name)
    if not callable(thing):
        return
    text = inspect.getdoc(thing)
    options = inspect.signature(thing).parameters.values()
    names = {p.name for p in options if p.kind not in (2, 4)}  # *, **
    # Of a metric these are its base's: the same for all.
    if inspect.isclass(thing) and issubclass(
        thing, keras_iris.metrics.PairMetric
    ):
        names -= {"name", "dtype"}
    told = {*re.findall(r"^ *(\w+): \S", text, re.M)}
    assert names <= told, names - told
    if inspect.isfunction(thing):
        result = inspect.signature(thing).return_annotation
        assert result is None or "Returns:" in text, "Returns"
