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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

# What `strftime_now` tells. With the real date the token ids of the same data
# would differ from day to day, and a run could not be resumed on the next.
# Llama 3's templates fall back to this date.
DATE = datetime.datetime(2024, 7, 26)
# The largest text, list or number (in bits) that one operation may make.
MAX_SIZE = 10_000_000
# Filters and methods of texts whose result can be longer than what they get.
_GROWING = {
    *("batch", "center", "expandtabs", "format", "format_map", "indent"),
    *("join", "ljust", "replace", "rjust", "slice", "tojson", "wordwrap"),
    "zfill",
}


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
    """Refuses operations whose result would fill the memory."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        """Checks the size of the result before it is made."""
        _check_size(operator, [left, right])
        return super().call_binop(context, operator, left, right)

    def call(
        self,
        context: jinja2.runtime.Context,
        function: Any,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Checks methods of texts likewise."""
        method = getattr(function, "__wrapped__", function)
        name = getattr(method, "__name__", "")
        text = getattr(method, "__self__", None)
        if name in _GROWING and isinstance(text, str):
            _check_size(name, [text, *args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A fresh environment, without access to Python.

    One `range` has at most 100,000 numbers and one operation makes at most
    `MAX_SIZE` characters. Nested loops and repeated concatenation can still
    take long and much memory: the sandbox protects the machine's files, not
    its time.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    for name in _GROWING & set(environment.filters):
        environment.filters[name] = _guarded(name, environment.filters[name])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    return environment


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
        OverflowError: If it has more than `MAX_SIZE` characters.
    """
    pieces, size = [], 0
    for piece in template.generate(variables):
        size += len(piece)
        _refuse_above(size, "the template")
        pieces.append(piece)
    return "".join(pieces)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps the marks of Jinja's filters
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_size(name, [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return checked


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _check_size(name: str, values: Iterable[Any]) -> None:
    """Refuses an operation by the sizes of what it gets."""
    # Not the context, which some filters get first.
    kinds = (str, int, list, tuple, dict)
    values = [value for value in values if isinstance(value, kinds)]
    if all(isinstance(value, int) for value in values):
        sizes = [value.bit_length() for value in values]
        if name == "**" and len(values) == 2:
            sizes[1] = max(0, values[1])
        size = math.prod(sizes) if name == "**" else sum(sizes)
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
        flat = [v for o in others for v in (o if isinstance(o, tuple) else [o])]
        widths += [value for value in flat if isinstance(value, int)]
    return max(widths, default=0)


def _measure(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


def _refuse_above(size: int, name: str) -> None:
    if size > MAX_SIZE:
        raise OverflowError(
            f"the result of {name} has a size of {size}, expected at most "
            f"{MAX_SIZE}"
        )


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
