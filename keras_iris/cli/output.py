"""What commands print: text, or JSON for machines."""

import contextlib
import functools
import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import typer


class Result(NamedTuple):
    """What a command has found out.

    Attributes:
        data: For `--json`.
        text: For people.
        status: The exit status.
    """

    data: Any
    text: str
    status: int = 0


# What TensorFlow logs while it is imported (2.21), whatever its variables say.
_LOG_LINE = re.compile(
    rb"[IW]\d{4} |WARNING: All log messages before absl|To enable the following"
)
_JSON = Annotated[
    bool, typer.Option("--json", help="Print JSON, and all else to stderr.")
]


def shown(command: Callable[..., Result]) -> Callable[..., None]:
    """Makes a command print its result, and gives it the option `--json`."""

    @functools.wraps(command)
    def run(*, as_json: bool, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
            _import_keras()
            if as_json:  # runs and Keras print what they do
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            result = command(**options)
        text = json.dumps(result.data) if as_json else result.text
        if text:
            print(text)
        if result.status:
            raise typer.Exit(result.status)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=_JSON,
    )
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), option],
        return_annotation=None,
    )
    run.__annotations__ = {**command.__annotations__, "as_json": _JSON}
    return run


def _import_keras() -> None:
    """Imports what takes seconds, without what TensorFlow logs meanwhile.

    Errors are for the command, which meets them again.
    """
    with _without_log_lines(), contextlib.suppress(ImportError, ValueError):
        import keras_hub  # noqa: F401


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Holds back what is written to stderr, and passes on the rest."""
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            held.seek(0)
            for line in held:
                if not _LOG_LINE.match(line):
                    os.write(stderr, line)
            os.close(stderr)
