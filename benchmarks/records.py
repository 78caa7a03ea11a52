"""What a benchmark prints and writes: a table, bars and a JSON record."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "keras_iris",
    "keras",
    "keras-hub",
    "jax",
    "tensorflow",
    "torch",
    "transformers",
    "trl",
    "numpy",
)
_START = time.perf_counter()


def bar(name, value, *, at_most=None, at_least=None):
    """A figure next to what it has to be.

    Args:
        name: What is measured.
        value: The figure.
        at_most: Its upper limit; or
        at_least: its lower limit.
    """
    is_upper = at_most is not None
    limit = at_most if is_upper else at_least
    return {
        "name": name,
        "limit": limit,
        "kind": "at most" if is_upper else "at least",
        "value": float(f"{value:.4g}"),
        "met": bool(value <= limit if is_upper else value >= limit),
    }


def parse_arguments(description, **options):
    """The arguments of a benchmark: `--output`, `--quick` and `options`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help="folder of the JSON record",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny settings, to see that it runs; figures mean nothing",
    )
    for name, keywords in options.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def finish(script, arguments, *, settings, rows, bars, **more):
    """Prints the figures of a benchmark and writes its record.

    Args:
        script: Its `__file__`, or another name for the record.
        arguments: What `parse_arguments` gave.
        settings: What was measured, a dictionary.
        rows: Dictionaries; the keys of the first are the table's columns.
        bars: What `bar` gave.
        **more: Other entries of the record.
    """
    name = Path(script).stem
    record = {
        "benchmark": name,
        "command": _command(),
        "quick": arguments.quick,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.perf_counter() - _START),
        "machine": machine(with_gpu=settings.get("device") == "gpu"),
        "versions": versions(),
        "settings": settings,
        "rows": [{k: _short(v) for k, v in row.items()} for row in rows],
        "bars": bars,
        **more,
    }
    print("\n" + format_table(record["rows"]))
    for entry in bars:
        print(format_bar(entry))
    if arguments.quick:
        print("Quick settings: the figures above mean nothing.")
    write_record(record, arguments.output)


def write_record(record, folder):
    """Writes a record to a folder as JSON.

    Quick ones get a name of their own, not to replace a real one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".quick.json" if record["quick"] else ".json"
    file = folder / (record["benchmark"] + suffix)
    file.write_text(json.dumps(record, indent=1) + "\n")
    return file


def format_bar(entry):
    """A bar as a line of text."""
    return (
        f"{'met   ' if entry['met'] else 'missed'}  {entry['name']}: "
        f"{entry['value']:g} ({entry['kind']} {entry['limit']:g})"
    )


def format_table(rows):
    """Rows as text in columns, numbers to the right."""
    columns = list(rows[0])
    cells = [columns] + [[str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    is_text = [isinstance(rows[0][c], str) for c in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def check_device(device):
    """Ends the program where a benchmark can't run.

    Args:
        device: "cpu" or "gpu".
    """
    if device == "gpu" and not _gpu():
        sys.exit(
            "This benchmark needs an NVIDIA GPU, and `nvidia-smi` shows none. "
            "Run it on a machine that has one; others run on the CPU."
        )


def machine(with_gpu=False):
    """Processor, cores, memory and system of this machine, and its GPU."""
    information = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", information)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.system(),
        **({"gpu": _gpu()} if with_gpu else {}),
    }


def versions():
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu():
    """The name of the first NVIDIA GPU, if there is one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.split("\n")[0]


def _command():
    """The command line, without where the record goes."""
    words = re.sub(r"--output[ =]\S+ ?", "", " ".join(sys.argv[1:]))
    name = Path(sys.argv[0]).name
    return f"python benchmarks/{name} {words}".strip()


def _short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value
