"""From a YAML file to the arguments of a run.

Nothing lists the options: sections are the signatures of functions, and objects
are classes by name, out of a few public modules.
"""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import keras
import yaml

import keras_iris
from keras_iris.data import ChatTemplate, load_dataset

Section = dict[str, Any]
# What the run itself passes.
_GIVEN = {"self", "model"}
# Arguments that are rows: a path, the arguments of
# `keras_iris.data.load_dataset`, or how many rows of the data are set aside.
_ROWS = {"data", "examples"}
# What objects may need and the run knows: `build`.
KNOWN = ("causal_lm", "end_token_ids", "max_new_tokens", "batch_size")


class _Loader(yaml.SafeLoader):
    """YAML without aliases, where 1e-3 is a number as in YAML 1.2."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (`*name`) aren't taken")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class Config(NamedTuple):
    """A checked configuration.

    Attributes:
        sections: Arguments by section, with a `Spec` for each object.
        text: The same as YAML.
    """

    sections: dict[str, Section]
    text: str


class Spec(NamedTuple):
    """An object that isn't made yet."""

    type: type
    arguments: Section


def read_config(path: Path, settings: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Args:
        path: A YAML file.
        settings: `"section.name=value"`, values as in YAML, which go before
            those of the file.

    Returns:
        The configuration.

    Raises:
        ValueError: It can't be read, or has names or values that its functions
            don't take. All such are told at once.
    """
    content = _parse(path.read_bytes(), str(path))
    for setting in settings:
        name, is_there, text = setting.partition("=")
        if not is_there:
            raise ValueError(
                "Expected --set section.name=value. Received: " + setting
            )
        value = _parse(f"value: {text}", f"--set {setting}")["value"]
        _set(content, name.split("."), value)
    problems: list[str] = []
    functions = _functions()
    _check_names(content, functions, "The configuration", problems)
    content = {"load": {}, "compile": {}, "self_play": {}} | content
    sections = {
        name: _check(functions[name], values, name, problems)
        for name, values in content.items()
        if name in functions
    }
    if "loss" not in sections["compile"]:
        problems.append("compile.loss is missing. Such as `loss: IRIS`.")
    if problems:
        raise ValueError("\n  ".join([f"{path} can't be run:", *problems]))
    return Config(sections, yaml.safe_dump(content, sort_keys=False))


def _set(content: Section, names: Sequence[str], value: Any) -> None:
    *parents, last = names
    for name in parents:
        inner = content.setdefault(name, {})
        if not isinstance(inner, dict):  # a plain name gets arguments
            key = "name" if name in _ROWS else "class_name"
            inner = content[name] = {key: inner}
        content = inner
    content[last] = value


def arguments_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that may be written, those of base classes as well."""
    functions = [function]
    if "." in function.__qualname__:  # a method: Keras' own takes the rest
        functions.append(keras.Model.compile)
    elif isinstance(function, type):
        functions += function.__mro__[1:-1]
    found: dict[str, inspect.Parameter] = {}
    for one in functions:
        parameters = inspect.signature(one).parameters
        found = {**parameters, **found}
        kinds = {p.kind for p in parameters.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: p
        for name, p in found.items()
        if p.kind not in variadic and name not in _GIVEN
    }


def build(value: Any, known: Mapping[str, Any]) -> Any:
    """Makes the objects of a value.

    Args:
        value: Out of a `Config`.
        known: What the run knows: classes that need an argument of such a name
            get it. `num_steps` is what shares like `"10%"` are of.
    """
    if isinstance(value, Spec):
        needed = {
            name: known[name]
            for name, p in arguments_of(value.type).items()
            if p.default is p.empty and name in known
        }
        own = build(value.arguments, known)
        try:
            return value.type(**{**needed, **own})
        except TypeError as error:
            raise ValueError(f"{value.type.__name__}: {error}") from error
    if isinstance(value, list):
        return [build(part, known) for part in value]
    if isinstance(value, dict):
        return {
            name: _share(part, known["num_steps"])
            if name.endswith("steps")
            else build(part, known)
            for name, part in value.items()
        }
    return value


def _share(value: Any, num_steps: int) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
        return max(1, round(num_steps * float(value[:-1]) / 100))
    return value


def _parse(text: str | bytes, where: str) -> dict[str, Any]:
    """Plain values only: what JSON has."""
    try:
        content = yaml.load(text, _Loader)
        content = json.loads(json.dumps(content))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} can't be read as YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"Expected sections `load`, `compile` and `self_play` in {where}. "
            f"Received: {str(content)[:60]!r}"
        )
    return content


def _functions() -> dict[str, Callable[..., Any]]:
    return {
        "distribution": keras_iris.distribution.make_distribution,
        "load": keras_iris.load,
        "compile": keras_iris.SelfPlayModel.compile,
        "self_play": keras_iris.SelfPlay,
    }


def _classes() -> dict[str, type]:
    """Those that a configuration may name."""
    modules = (
        *(keras.metrics, keras.callbacks, keras.optimizers.schedules),
        *(keras.optimizers, keras_iris.metrics, keras_iris.callbacks),
        *(keras_iris.generation, keras_iris.evaluation, keras_iris.losses),
    )
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and not name.startswith("_")
    }


def _check_names(
    values: Any, names: Mapping[str, Any], where: str, problems: list[str]
) -> None:
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            known = near or sorted(names)
            hint = "Did you mean" if near else "Is it one of"
            problems.append(
                f"{where}: {name!r} isn't known. {hint} {', '.join(known)}?"
            )


def _check(
    function: Callable[..., Any],
    values: Any,
    where: str,
    problems: list[str],
) -> Section:
    """Checks arguments, and makes a `Spec` of each object."""
    if not isinstance(values, dict):
        problems.append(
            f"{where} has to be arguments by name. Received: {values!r}"
        )
        return {}
    names = arguments_of(function)
    _check_names(values, names, where, problems)
    problems += [
        f"{where}.{name} is missing."
        for name, p in names.items()
        if p.default is p.empty and name not in (*values, *KNOWN)
    ]
    found = {}
    for name in (name for name in values if name in names):
        place, hint = f"{where}.{name}", names[name].annotation
        if name in _ROWS:
            found[name] = _check_rows(values[name], place, problems)
            continue
        value = found[name] = _resolve(values[name], hint, place, problems)
        if not _fits(value, hint):
            problems.append(
                f"{place} has to be {_describe(hint)}. Received: "
                f"{values[name]!r}"
            )
    return found


def _check_rows(value: Any, where: str, problems: list[str]) -> Any:
    if isinstance(value, dict):
        return _check(load_dataset, value, where, problems)
    is_number = isinstance(value, int) and where.endswith(".examples")
    if not (isinstance(value, str) or is_number):
        problems.append(
            f"{where} has to be a path, a dataset's id or arguments of "
            f"`keras_iris.data.load_dataset`. Received: {value!r}"
        )
    return value


def _resolve(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        return [
            _resolve(part, Any, f"{where}[{i}]", problems)
            for i, part in enumerate(value)
        ]
    if isinstance(value, str) and ChatTemplate in get_args(hint):
        return ChatTemplate.named(value)
    classes = _classes()
    wanted = get_args(hint) or (hint,)
    if isinstance(value, str) and str not in wanted:
        kinds = {kind.__name__ for kind in wanted if isinstance(kind, type)}
        # A misspelt name, too, where nothing but an object is wanted.
        if value in classes or kinds & classes.keys():
            value = {"class_name": value}
    if not isinstance(value, dict) or "class_name" not in value:
        return value
    _check_names(value, {"class_name": 0, "config": 0}, where, problems)
    name = str(value["class_name"])
    _check_names({name: 0}, classes, f"{where}.class_name", problems)
    if name not in classes:
        return None
    config = value.get("config") or {}
    return Spec(
        classes[name],
        _check(classes[name], config, f"{where}.config", problems),
    )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, as YAML has it, is of an annotated type."""
    if isinstance(hint, InitVar):
        hint = hint.type
    origin, parts = get_origin(hint), get_args(hint)
    if hint in (Any, inspect.Parameter.empty):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if hint is None:
        return value is None
    wanted = origin or hint
    if isinstance(value, Spec):
        return wanted is Callable or issubclass(value.type, wanted)
    if wanted in (int, float) and isinstance(value, bool):
        return False
    accepted = {float: int | float, Path: str}.get(wanted, wanted)
    return isinstance(value, accepted)


def _describe(hint: Any) -> str:
    if isinstance(hint, InitVar):
        hint = hint.type
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:\w+\.)+", "", text)
