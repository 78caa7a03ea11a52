"""Writes the tables of the documents from the records of the benchmarks.

    python benchmarks/table.py           # between two marks of a document
    python benchmarks/table.py --check   # fails if a document differs

Speed and memory go to docs/benchmarks.md, five of the figures to README.md, and
what trains better to docs/evidence.md, each benchmark to a place of its own.
Quick records don't count.
"""

import argparse
import json
import sys
from pathlib import Path

import records

ROOT = Path(__file__).parents[1]
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
    "tabular": (
        "method",
        "rate",
        "KL 0",
        "KL 1",
        "KL 2",
        "KL 5",
        "solved 1",
        "solved last",
    ),
    "headline_g2p": (
        "setting",
        "method",
        "rates",
        "NLL",
        "NLL - control",
        "errors %",
        "errors - control",
        "right %",
        "sampled: errors %",
        "sampled: right %",
    ),
    "smollm2_study": (
        "arm",
        "nll_per_token",
        "length",
        "repeated_3",
        "distinct_1",
        "distinct_2",
        "told_apart",
    ),
    "generation": (
        "contestant",
        "useful tokens/s",
        "x transformers",
        "x sorted",
        "peak MB",
    ),
    "evaluation_harness": (
        "task",
        "contestant",
        "first run, s",
        "s",
        "x hf",
        "largest difference, nats",
        "answers that differ",
    ),
    "sharding": (
        "layout",
        "all-gather MB",
        "all-reduce MB",
        "x least of FSDP",
        "temporary MB",
        "x memory of one",
    ),
    "plan": (
        "model",
        "machine",
        "trains",
        "GiB a device (computed)",
        "fits (computed)",
        "generation h (computed from a measured rate)",
        "training h (computed from a measured rate)",
        "sending h (computed)",
        "paper, 8 H100 (theirs), h",
    ),
}
# Benchmarks of what is learnt, not of how fast.
EVIDENCE = ("tabular", "headline_g2p", "smollm2_study")
# What a figure of the README says, and where it stands: the record, the column
# and what its rows have, beside a backend.
FIGURES = (
    ("training: tokens/s, TRL = 1", "train_step", "x TRL", {}),
    (
        "training: tokens/s, a plain PyTorch loop = 1",
        "train_step",
        "x plain loop",
        {},
    ),
    (
        "generation: tokens/s, transformers = 1",
        "generation",
        "x transformers",
        {},
    ),
    (
        "log-probs: memory, whole logits = 1",
        "log_probs",
        "memory ratio",
        {"size": "large"},
    ),
    (
        "training, 0.5B parameters: tokens/s, TRL = 1",
        "train_step_gpu",
        "x TRL",
        {},
    ),
)
BACKENDS = ("jax", "tensorflow", "torch")
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


def make_figures(machines):
    """The README's table: a row a figure of `FIGURES`."""
    found = {name: record for each in machines for name, record in each.items()}
    rows = [
        [
            text,
            *(
                _cell(found[name], column, backend, where)
                for backend in BACKENDS
            ),
            _machine(found[name]["machine"]),
            f"`{found[name]['command']}`",
        ]
        for text, name, column, where in FIGURES
        if name in found
    ]
    columns = ("figure", "JAX", "TensorFlow", "PyTorch", "machine", "command")
    return _markdown(columns, rows)


def _cell(record, column, backend, where):
    """The figure of a backend, or nothing where it wasn't measured."""
    names = ({"backend": backend}, {"contestant": f"keras_iris, {backend}"})
    for row in record["rows"]:
        if any((where | name).items() <= row.items() for name in names):
            return _number(row[column])
    return ""


def make_block(found):
    """The lines about the records of a machine."""
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
    if bars:
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


def _kept(machines, is_evidence):
    """The records that are evidence, or those that aren't."""
    kept = [
        {n: r for n, r in found.items() if (n in EVIDENCE) == is_evidence}
        for found in machines
    ]
    return [found for found in kept if found]


def insert(document, block, name="benchmarks"):
    """The document with the block between the marks of a name.

    Raises:
        ValueError: It lacks a mark.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise ValueError(
            f"The document has no place for the figures: expected {start} and "
            f"{end}, each on a line of its own. Add them."
        )
    before, rest = document.split(start, 1)
    after = rest.split(end, 1)[1]
    return f"{before}{start}\n\n{block}\n\n{end}{after}"


def _caption(found):
    record = next(iter(found.values()))
    machine = record["machine"]
    # A package that one of them didn't need may be missing there.
    versions = {
        package: version
        for each in found.values()
        for package, version in each["versions"].items()
    }
    dates = sorted(record["date"] for record in found.values())
    packages = ", ".join(
        f"{package} {versions[package]}"
        for package in _PACKAGES
        if package in versions
    )
    gpu = f"{machine['gpu']},\n" if "gpu" in machine else ""
    return (
        f"Measured on {gpu}{_processor(machine)}, "
        f"{machine['memory_gib']} GiB,\n"
        f"{' to '.join(sorted({dates[0], dates[-1]}))}, with {packages}."
    )


def _machine(machine):
    return machine.get("gpu") or _processor(machine)


def _processor(machine):
    return f"{machine['processor']}, {machine['cores']} cores"


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
    """Writes or checks the documents; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    machines = read_records(options.results)
    speed = "\n\n".join(map(make_block, _kept(machines, is_evidence=False)))
    places = [
        ("docs/benchmarks.md", "benchmarks", speed),
        ("README.md", "benchmarks", make_figures(machines)),
    ] + [
        ("docs/evidence.md", name, make_block({name: record}))
        for found in _kept(machines, is_evidence=True)
        for name, record in found.items()
    ]
    code = 0
    for document, name, block in places:
        file = options.root / document
        before = file.read_text()
        after = insert(before, block, name)
        if not options.check:
            file.write_text(after)
        elif before != after:
            print(
                f"{document} isn't in step with the results. Run "
                "`python benchmarks/table.py`."
            )
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
