"""What commands print: text, or JSON for machines."""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable
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


_JSON = Annotated[
    bool, typer.Option("--json", help="Print JSON, and all else to stderr.")
]


def shown(command: Callable[..., Result]) -> Callable[..., None]:
    """Makes a command print its result, and gives it the option `--json`."""

    @functools.wraps(command)
    def run(*, as_json: bool, **options: Any) -> None:
        with contextlib.ExitStack() as stack:
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
