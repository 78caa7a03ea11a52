"""The sandboxed Jinja environment that chat templates are rendered in.

Configured as transformers does it, so that a checkpoint's template gives the
same text. Imported when a template is first compiled, because importing
Jinja takes time.
"""

import datetime
import json
from collections.abc import Sized
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
# The largest text, list or number (in bits) that one product may make.
MAX_PRODUCT_SIZE = 1_000_000


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
    """Refuses products that would fill the memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        """Checks the size of the result before it is made."""
        size = _product_size(operator, left, right)
        if size > MAX_PRODUCT_SIZE:
            raise OverflowError(
                f"the result of {operator!r} has a size of {size}, expected "
                f"at most {MAX_PRODUCT_SIZE}"
            )
        return super().call_binop(context, operator, left, right)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A fresh environment, without access to Python.

    One `range` has at most 100,000 numbers and one product at most
    `MAX_PRODUCT_SIZE` characters. Nested loops and repeated concatenation
    can still take long and much memory: the sandbox protects the machine's
    files, not its time.
    """
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return DATE.strftime(format)


def _product_size(operator: str, left: Any, right: Any) -> int:
    """Characters or items of a repetition, bits of a whole number."""
    if isinstance(left, int) and isinstance(right, int):
        times = right if operator == "**" else 1
        other = 0 if operator == "**" else right.bit_length()
        return left.bit_length() * times + other
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, Sized) and isinstance(times, int):
            return len(sequence) * times
    return 0


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
