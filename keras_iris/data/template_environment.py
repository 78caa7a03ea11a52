"""The sandboxed Jinja environment that chat templates are rendered in.

Configured as transformers does it, so that a checkpoint's template gives the
same text. Imported when a template is first compiled, because importing
Jinja takes time.
"""

import datetime
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from keras_iris.data import template_steps
from keras_iris.data.template_steps import (
    CHARACTERS,
    MAX_BITS,
    Context,
    count_steps,
    walk,
)

# What `strftime_now` tells. With the real date the token ids of the same data
# would differ from day to day, and a run could not be resumed on the next.
# Llama 3's templates fall back to this date.
DATE = datetime.datetime(2024, 7, 26)
# The largest text or list that one operation may make.
MAX_SIZE = 10_000_000
MAX_SOURCE = 100_000  # characters
# Filters and methods of texts whose result can be longer than what they get.
_GROWING = {
    *("batch", "center", "expandtabs", "format", "format_map", "indent"),
    *("join", "ljust", "replace", "rjust", "slice", "tojson", "wordwrap"),
    "zfill",
}
# Filters that look at no part of what they get.
_CONSTANT = {
    *("abs", "attr", "count", "d", "default", "first", "last", "length"),
    "random",
}
# Those that go through a text in Python, each character a step.
_SLOW = {
    *("format", "format_map", "pprint", "title", "urlencode", "wordcount"),
    *("wordwrap", "xmlattr"),
}
# Those that go through texts more than once for each part, which are for the
# web.
_LEFT_OUT = {"striptags", "urlize"}
# Tests that look at all of what they get.
_READING = {
    *("in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan"),
    *(">=", "ge", "<", "lt", "lessthan", "<=", "le", "lower", "upper"),
}
_CALL = 5  # steps
# What costs by what is in it, and not by what it is given.
_COUNTED = (jinja2.runtime.Macro, jinja2.runtime.LoopContext)


class GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}`, which changes no text.

    Some templates mark assistant turns with it.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Keeps the tag's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(
            ("name:endgeneration",), drop_needle=True
        )
        return jinja2.nodes.Scope(body, lineno=line)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses operations whose result would fill the memory, and counts."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    context_class = Context

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuses methods that can make much out of little."""
        if isinstance(obj, int | float | bytes) or attr == "translate":
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        """Checks the size of the result before it is made."""
        assert isinstance(context, Context)
        if operator == "+" and type(left) is type(right) is str:  # most are
            size = len(left) + len(right)
            _refuse_above(size, "'+'")
            context.steps.take(1 + size // CHARACTERS)
            return left + right
        if operator == "%":
            context.steps.read(right)  # which is written into a text
        _check_size(operator, [left, right])
        result = super().call_binop(context, operator, left, right)
        context.steps.make(result)
        return result

    def call(
        self,
        context: jinja2.runtime.Context,
        function: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Checks methods of texts likewise."""
        assert isinstance(context, Context)
        context.steps.take(_CALL)
        if isinstance(function, _COUNTED):
            return super().call(context, function, *args, **kwargs)
        method = getattr(function, "__wrapped__", function)
        owner = getattr(method, "__self__", None)
        values = [*args, *kwargs.values()]
        if isinstance(owner, str | list):
            values.insert(0, owner)
        name = method.__name__ if isinstance(owner, str) else ""
        _prepare(context, name, values)
        result = super().call(context, function, *args, **kwargs)
        context.steps.make(result)
        return result


def compile_template(source: str) -> jinja2.Template:
    """Compiles a template for a sandbox, without access to Python.

    One `range` has at most 100,000 numbers, one operation makes at most
    `MAX_SIZE` characters, and a rendering takes at most `MAX_STEPS`.

    Raises:
        OverflowError: The source has more than `MAX_SOURCE` characters.
        jinja2.TemplateError: It isn't a template.
    """
    _refuse_above(len(source), "reading the source", MAX_SOURCE)
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    filters: dict[str, Any] = environment.filters
    tests: dict[str, Any] = environment.tests
    filters |= {"round": _round, "sum": _sum, "tojson": _to_json}
    for name in filters.keys() - _CONSTANT:
        filters[name] = _counted(name, filters[name])
    for name in _LEFT_OUT:
        del filters[name]
    filters |= {
        template_steps.TAKE: _take,
        template_steps.READ: _read,
        template_steps.MAKE: _make,
        template_steps.CONCATENATE: _concatenate,
    }
    for name in _READING:
        tests[name] = _counted(name, tests[name])
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    tree = environment.parse(source)
    return environment.from_string(count_steps(tree))


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        OverflowError: It has more than `MAX_SIZE` characters, or takes more
            than `MAX_STEPS`.
    """
    text = template.render(variables)
    _refuse_above(len(text), "the template")
    return text


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test that takes steps for what it reads and makes."""
    wanted = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    @functools.wraps(function)
    def count(context: Context, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        each = _prepare(context, name, values)
        if wanted:
            known = {
                "context": context,
                "eval_context": context.eval_ctx,
                "environment": context.environment,
            }
            args = (known[wanted.name], *args)
        result = function(*args, **kwargs)
        if isinstance(result, Iterator):
            return context.steps.count(result, each)
        context.steps.make(result)
        return result

    return count


def _prepare(context: Context, name: str, values: list[Any]) -> int:
    """Checks the size of a result, and takes the steps of making it.

    Returns:
        The steps of an element, where there are elements.
    """
    steps, (first, *others) = context.steps, values or [None]
    before = steps.left
    steps.read(first)
    if name in _SLOW:
        steps.take(CHARACTERS * (before - steps.left))
    for value in others:
        steps.read(value)
    if name in _GROWING:
        _check_size(name, values)
    # Searched for in a text, or looked up in each element.
    longest = max((len(v) for v in others if isinstance(v, str)), default=0)
    if isinstance(first, str):
        steps.take(len(first) * longest // 256)
    elif isinstance(first, list | tuple | range):
        steps.take(len(first) * longest // 4)
    return 1 + longest // 4


@jinja2.pass_context
def _take(context: Context, number: int) -> bool:
    context.steps.take(abs(number))
    return True


@jinja2.pass_context
def _read(context: Context, value: Any) -> Any:
    context.steps.read(value)
    return value


@jinja2.pass_context
def _make(context: Context, value: Any) -> Any:
    context.steps.make(value)
    return value


@jinja2.pass_context
def _concatenate(context: Context, values: list[Any]) -> str:
    context.steps.read(values)
    texts = list(map(str, values))
    _refuse_above(sum(map(len, texts)), "'~'")
    if context.eval_ctx.autoescape:
        return jinja2.runtime.markup_join(values)
    return "".join(texts)


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    _refuse_above(precision, "'round'", 100)
    return jinja2.filters.do_round(value, precision, method)  # type: ignore


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment,
    values: Iterable[Any],
    attribute: str | int | None = None,
    start: float = 0,
) -> Any:
    # Lists would be copied as often as there are any.
    if not isinstance(start, int | float):
        raise TypeError("'sum' adds numbers")
    return jinja2.filters.sync_do_sum(environment, values, attribute, start)


def _strftime_now(format: str) -> str:
    _refuse_above(len(format), "'strftime_now'", 1_000)
    return DATE.strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _check_size(name: str, values: Iterable[Any]) -> None:
    """Refuses an operation by the sizes of what it gets."""
    # Others have no size.
    kinds = (str, int, list, tuple, dict)
    values = [value for value in values if isinstance(value, kinds)]
    if all(isinstance(value, int) for value in values):
        sizes = [value.bit_length() for value in values]
        if name == "**" and len(values) == 2:
            sizes[1] = max(0, values[1])
        size = math.prod(sizes) if name == "**" else sum(sizes)
        _refuse_above(size, repr(name), MAX_BITS)
    elif name == "%" or name.startswith("format"):
        size = _formatted_size(values)
    elif name == "+":
        size = sum(map(_measure, values))
    elif name == "replace" and [type(v) for v in values[:3]] == 3 * [str]:
        text, old, new = values[:3]
        size = len(text) + text.count(old) * len(new)
    else:
        size = math.prod(max(1, _measure(value)) for value in values)
    _refuse_above(size, repr(name))


def _formatted_size(values: list[Any]) -> int:
    text, *others = values
    widths = [int(digits) for digits in re.findall(r"\d+", str(text))]
    if re.search(r"\*|{[^}]*{", str(text)):  # widths are among the values
        widths += [value for value in walk(others) if isinstance(value, int)]
    return max(widths, default=0)


def _measure(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


def _refuse_above(size: int, name: str, limit: int = MAX_SIZE) -> None:
    if size > limit:
        raise OverflowError(
            f"the result of {name} has a size of {size}, expected at most "
            f"{limit}"
        )


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
