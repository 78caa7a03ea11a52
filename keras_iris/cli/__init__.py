"""The command line: `keras-iris`, or `python -m keras_iris`.

Commands import Keras when they run: help and bad options don't wait for it.
"""

import os
import sys
from collections.abc import Sequence

import typer
import yaml

from keras_iris.cli import doctor, model, runs, start

app = typer.Typer(
    help="Self-play fine-tuning of language models in Keras 3.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _command in (
    start.quickstart,
    start.run,
    start.estimate,
    runs.report,
    runs.samples,
    runs.export,
    model.generate,
    model.evaluate,
    doctor.doctor,
):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words of the command; by default those of the process.

    Returns:
        The exit status: 0, 1 where `doctor` finds a problem, 2 after an error,
        130 after an interrupt.
    """
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        status = app(
            words or ["--help"], prog_name="keras-iris", standalone_mode=False
        )
    except (
        typer.TyperException,
        ValueError,
        OSError,
        ImportError,
        FloatingPointError,
        MemoryError,
        yaml.YAMLError,
    ) as error:
        if os.environ.get("KERAS_IRIS_TRACEBACK"):
            raise
        if isinstance(error, typer.TyperException):
            error = ValueError(error.format_message())
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(status or 0)
