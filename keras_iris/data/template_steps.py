"""Counts what the rendering of a chat template takes, and ends it in time.

A step is a node of a loop's or macro's body each time that it is run, an
element that an operation reads, or 16 characters. Steps are counted and not
seconds, so that a template is refused on every machine or on none. Calls,
operators, filters and tests count for themselves (`template_environment`);
`count_steps` puts what Jinja has no hook for into the tree of a template.
"""

from collections.abc import (
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Sized,
    ValuesView,
)
from typing import Any

import jinja2.nodes
import jinja2.runtime
import jinja2.utils
import jinja2.visitor

# Of a rendering: about a second.
MAX_STEPS = 2_000_000
# Of a number: division takes the square of them.
MAX_BITS = 10_000
CHARACTERS = 16  # of a step
# Names of filters that can't be written in a template.
TAKE, READ, MAKE, CONCATENATE = "*take", "*read", "*make", "*concatenate"


_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


def walk(value: Any) -> Iterator[Any]:
    """A value and all that is in it, as often as it is there."""
    parts = [value]
    while parts:
        part = parts.pop()
        yield part
        if isinstance(part, jinja2.utils.Namespace):
            parts.append(part._Namespace__attrs)  # as its text shows them
        if isinstance(part, dict):
            parts += part.values()
        if isinstance(part, _CONTAINERS):
            parts += part


class Steps:
    """Those that a rendering has left."""

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def take(self, number: int) -> None:
        """Takes some.

        Raises:
            OverflowError: There aren't as many.
        """
        self.left -= number
        if self.left < 0:
            raise OverflowError(
                f"it takes more than {MAX_STEPS:,} steps: loops or macros "
                "repeat too much"
            )

    def read(self, value: Any) -> None:
        """Takes a value's, with all that is in it, as often as it is there."""
        if type(value) is str:  # most are
            self.take(1 + len(value) // CHARACTERS)
            return
        for part in walk(value):
            if isinstance(part, str | bytes):
                self.take(1 + len(part) // CHARACTERS)
            else:
                self.take(1 + (len(part) if isinstance(part, Sized) else 0))

    def make(self, value: Any) -> None:
        """Takes those of a new value, whose parts were there before.

        Raises:
            OverflowError: There aren't as many, or the value is a number of
                more than `MAX_BITS`.
        """
        if isinstance(value, str | bytes):
            self.take(1 + len(value) // CHARACTERS)
        elif isinstance(value, list | tuple | dict):
            self.take(1 + len(value))
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise OverflowError(f"a number has more than {MAX_BITS:,} bits")

    def count(self, items: Iterator[Any], number: int) -> Iterator[Any]:
        """The items, of which each takes so many."""
        for item in items:
            self.take(number)
            yield item


class Context(jinja2.runtime.Context):
    """The variables of a rendering, and its steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps = Steps()

    def derived(self, locals: dict[str, Any] | None = None) -> "Context":
        """The context of a block, which has the same steps."""
        context: Context = super().derived(locals)  # type: ignore[assignment]
        context.steps = self.steps
        return context


def count_steps(template: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Makes a template count its steps, by filters with the names above.

    Args:
        template: Its syntax tree, which is changed.

    Raises:
        OverflowError: A number in it has more than `MAX_BITS`.
    """
    environment = template.environment
    _Counter().visit(template)
    assert environment is not None  # it was parsed
    return template.set_environment(environment)  # type: ignore[return-value]


def _filter(name: str, node: jinja2.nodes.Expr) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(
        node, name, [], [], None, None, lineno=node.lineno
    )


def _take(body: Iterable[jinja2.nodes.Node]) -> jinja2.nodes.Filter:
    """Takes as many steps as a body has nodes; it is true."""
    nodes = [
        node
        for part in body
        for node in (part, *part.find_all(jinja2.nodes.Node))
    ]
    texts = (n.data for n in nodes if isinstance(n, jinja2.nodes.TemplateData))
    number = 1 + len(nodes) + sum(map(len, texts)) // CHARACTERS
    line = nodes[0].lineno if nodes else 1
    return _filter(TAKE, jinja2.nodes.Const(number, lineno=line))


def _is_small(node: jinja2.nodes.Node) -> bool:
    """Whether a value is written down in the source."""
    if isinstance(node, jinja2.nodes.List | jinja2.nodes.Tuple):
        return all(map(_is_small, node.items))
    return isinstance(node, jinja2.nodes.Const)


class _Counter(jinja2.visitor.NodeTransformer):
    """Puts a filter in each place that can take many steps."""

    def _visit_body(self, node: Any) -> Any:
        count = _take(node.body)
        self.generic_visit(node)
        statement = jinja2.nodes.ExprStmt(count, lineno=node.lineno)
        node.body.insert(0, statement)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_For(self, node: jinja2.nodes.For) -> Any:
        count = node.test and _take([node.test])
        self._visit_body(node)
        if node.test and count:
            node.test = jinja2.nodes.And(count, node.test, lineno=node.lineno)
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> Any:
        self.generic_visit(node)
        data = jinja2.nodes.TemplateData | jinja2.nodes.Const
        node.nodes = [
            n if isinstance(n, data) else _filter(READ, n) for n in node.nodes
        ]
        return node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> Any:
        self.generic_visit(node)
        left = node.expr
        for operand in node.ops:
            right = operand.expr
            is_search = operand.op in ("in", "notin")
            if not _is_small(right) and (is_search or not _is_small(left)):
                operand.expr = _filter(READ, right)
            left = right
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> Any:
        self.generic_visit(node)
        items = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return _filter(CONCATENATE, items)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, jinja2.nodes.Slice):
            return _filter(MAKE, node)
        if not _is_small(node.arg):  # a tuple may hold much
            node.arg = _filter(READ, node.arg)
        return node

    def visit_Pair(self, node: jinja2.nodes.Pair) -> Any:
        self.generic_visit(node)
        if not _is_small(node.key):
            node.key = _filter(READ, node.key)
        return node

    def visit_Const(self, node: jinja2.nodes.Const) -> Any:
        Steps().make(node.value)
        return node
