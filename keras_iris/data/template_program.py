"""The program that renders chat templates: see `template_process`.

It reads lines of JSON, `[source, variables, ...]`, and answers each with a
list of texts, or with what is wrong. Jinja is configured as transformers does
it, so that a checkpoint's template gives the same text.
"""

import datetime
import functools
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.exceptions import SecurityError

# What `strftime_now` tells. With the real date the token ids of the same data
# would differ from day to day, and a run could not be resumed on the next.
# Llama 3's templates fall back to this date.
DATE = datetime.datetime(2024, 7, 26)
MAX_SIZE = 10_000_000  # characters of a text
MEMORY_BYTES = 2**30  # of this process, where the system can limit them
# Of a line, where the process that asked has died, and ends nothing any more.
ALARM_SECONDS = 60


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


def main() -> None:
    """Answers every line until there are no more."""
    _limit_memory()
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    filters: dict[str, Any] = environment.filters
    filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    compile_template = functools.lru_cache(32)(environment.from_string)
    set_alarm = getattr(signal, "alarm", lambda seconds: None)  # not Windows
    for line in sys.stdin.buffer:
        set_alarm(ALARM_SECONDS)
        texts: list[str] = []
        answer: Any = texts
        try:
            source, *variables = json.loads(line)
            template = compile_template(source)
            texts.extend(_render(template, each) for each in variables)
        except Exception as error:  # a template can raise anything
            answer = {
                "reason": f"{type(error).__name__}: {error}",
                "index": len(texts),
                "is_unsafe": isinstance(error, SecurityError),
            }
        print(json.dumps(answer), flush=True)
        set_alarm(0)


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_SIZE:
            raise OverflowError(f"it writes more than {MAX_SIZE:,} characters")
    return "".join(pieces)


def _limit_memory() -> None:
    try:
        import resource

        limits = (MEMORY_BYTES, MEMORY_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    except (ImportError, ValueError, OSError):
        pass  # Windows and macOS can't


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


if __name__ == "__main__":
    main()
