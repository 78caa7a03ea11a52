"""Writes the README's figures from the records of the benchmarks.

    python benchmarks/table.py           # between the README's two marks
    python benchmarks/table.py --check   # fails if the README differs

Quick records don't count.
"""

import argparse
import json
import sys
from pathlib import Path

import records

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
# A benchmark whose rows are shown, and the columns to show.
COLUMNS = {
    "train_step": (
        "contestant",
        "tokens/s",
        "x plain loop",
        "x TRL",
        "peak MB",
    ),
    "train_step_smollm2": (
        "contestant",
        "tokens/s",
        "x plain loop",
        "peak MB",
    ),
    "train_step_gpu": (
        "contestant",
        "tokens/s",
        "x plain loop",
        "x TRL",
        "peak MB",
        "MFU",
    ),
    "log_probs": ("size", "backend", "dtype", "time ratio", "memory ratio"),
    "log_probs_gpu": ("size", "backend", "dtype", "time ratio", "memory ratio"),
    "generation": (
        "contestant",
        "useful tokens/s",
        "x transformers",
        "x sorted",
        "peak MB",
    ),
}
_PACKAGES = ("keras", "jax", "tensorflow", "torch", "transformers", "trl")


def read_records(folder):
    """The records of a folder by name, one dictionary a machine.

    Raises:
        ValueError: There are none.
    """
    files = sorted(folder.glob("*.json"))
    found = [json.loads(file.read_text()) for file in files]
    machines = {}
    for record in found:
        if not record["quick"]:
            machine = json.dumps(record["machine"])
            machines.setdefault(machine, {})[record["benchmark"]] = record
    if not machines:
        raise ValueError(
            f"{folder} has no record of a benchmark. Run `make bench`."
        )
    return list(machines.values())


def make_block(found):
    """The README's lines about the records of a machine."""
    blocks = [_caption(found)]
    for name, columns in COLUMNS.items():
        if name in found:
            rows = _rows(found[name], columns)
            blocks.append(f"`{found[name]['command']}`:")
            blocks.append(_markdown(columns, rows))
    bars = [
        [
            f"`{name}`",
            bar["name"],
            f"{bar['kind']} {_number(bar['limit'])}",
            _number(bar["value"]),
            "met" if bar["met"] else "missed",
        ]
        for name, record in found.items()
        for bar in record["bars"]
    ]
    columns = ("benchmark", "figure", "bar", "measured", "")
    blocks.append(_markdown(columns, bars))
    return "\n\n".join(blocks)


def _rows(record, columns):
    """The cells of some columns; a row after the first may lack some."""
    rows = record["rows"]
    unknown = set(columns) - set(rows[0])
    if unknown:
        raise ValueError(
            f"The record of {record['benchmark']} has no {sorted(unknown)}, "
            f"expected columns among {list(rows[0])}. Change `COLUMNS`."
        )
    return [
        [_number(row.get(column, "")) for column in columns] for row in rows
    ]


def insert(readme, block):
    """The README with the block between its marks.

    Raises:
        ValueError: It lacks a mark.
    """
    if START not in readme or END not in readme:
        raise ValueError(
            f"The README has no place for the figures: expected {START} and "
            f"{END}, each on a line of its own. Add them."
        )
    before, rest = readme.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n\n{block}\n\n{END}{after}"


def _caption(found):
    record = next(iter(found.values()))
    machine, versions = record["machine"], record["versions"]
    dates = sorted(record["date"] for record in found.values())
    packages = ", ".join(
        f"{package} {versions[package]}"
        for package in _PACKAGES
        if package in versions
    )
    gpu = f"{machine['gpu']},\n" if "gpu" in machine else ""
    return (
        f"Measured on {gpu}{machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB,\n"
        f"{' to '.join(sorted({dates[0], dates[-1]}))}, with {packages}."
    )


def _markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value):
    if isinstance(value, str):
        return value
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main(arguments=None):
    """Writes or checks the README; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    before = options.readme.read_text()
    blocks = [make_block(found) for found in read_records(options.results)]
    after = insert(before, "\n\n".join(blocks))
    if options.check:
        if before != after:
            print(
                f"{options.readme.name} isn't in step with the results. Run "
                "`python benchmarks/table.py`."
            )
        return int(before != after)
    options.readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
