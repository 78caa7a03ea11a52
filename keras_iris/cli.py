"""The command line: `python -m keras_iris`."""

import argparse
import sys
from collections.abc import Sequence

from keras_iris.evaluation import report, samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words of the command; by default those of the process.

    Returns:
        The exit status: 0, or 2 where the command can't be carried out.
    """
    parser = argparse.ArgumentParser(prog="python -m keras_iris")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "report": "write report.html and plots/*.png into a run's folder",
        "samples": "print what the model answered to held-out prompts",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("run_dir", help="folder of a run, finished or not")
    options = parser.parse_args(arguments)
    carry_out = report if options.command == "report" else samples
    try:
        print(carry_out(options.run_dir))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
