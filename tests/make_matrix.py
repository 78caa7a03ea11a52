"""Writes docs/architectures.md from the tests of architectures.

`make matrix` runs it in the virtual environment; it takes a few minutes a
backend.
"""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A test's name, and what it shows.
TESTS = "tests/hub/test_architectures.py"
COLUMNS = {
    "loads": "loads",
    "logits": "logits",
    "generates": "generates",
    "trains_and_exports": "trains, exports",
    "exports_without_source": "exports without source",
    "adapters": "adapters",
    "refuses_what_it_does_not_know": "refuses unknown entries",
}
# What a test records; nothing after what went wrong.
TESTS_OF_OTHERS = "tests/hub/test_others.py"
COLUMNS_OF_OTHERS = ("loads", "log-probs", "generates", "trains")
BACKENDS = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}
HEAD = f"""\
# Architectures

Written by `make matrix` from the results of `{TESTS}` and
`{TESTS_OF_OTHERS}` on {", ".join(BACKENDS.values())}; don't edit it.

Each row is a `model_type` of config.json that `keras_iris.load` reads
exactly. The tests take tiny random checkpoints whose config.json has no
default value in any entry that the model reads. Logits are those of
transformers to 1e-5, 64 greedy tokens are the same, one step of training
gives the weights that PyTorch's gives to 1e-5, and the exported folder has
the same logits in transformers. An entry that keras_iris doesn't know, or
that KerasHub doesn't compute, is an error at `load` that names it.

Routers of experts have a loss of their own where config.json says
`output_router_logits`, as in transformers. For several layers it is the mean
of the layers' losses, where transformers takes the loss of the layers' means.

"""
HEAD_OF_OTHERS = """
# Others, as KerasHub converts them

Other architectures pass through KerasHub's own converters. `load` compares
their log-probs for a few tokens with those of transformers where that is
installed. They can't be exported, and their adapters can't be saved as peft's:
`SelfPlay` refuses engines that need that, before it begins. Here are tiny
random checkpoints: mean difference of log-probs in nats, 16 greedy tokens, and
the log-probs after one step of training, as in transformers; or the error of
`load`.

"""

Cells = dict[tuple[str, str], str]


def main() -> int:
    """Runs the tests of each backend and writes the tables."""
    results = {name: run(backend) for backend, name in BACKENDS.items()}
    tables = (
        HEAD,
        *table({k: v[TESTS] for k, v in results.items()}, COLUMNS),
        HEAD_OF_OTHERS,
        *table(
            {k: v[TESTS_OF_OTHERS] for k, v in results.items()},
            dict(zip(COLUMNS_OF_OTHERS, COLUMNS_OF_OTHERS, strict=True)),
        ),
    )
    (ROOT / "docs" / "architectures.md").write_text("".join(tables))
    cells = [cells for v in results.values() for cells in v.values()]
    values = {value for part in cells for value in part.values()}
    return int(not values or "no" in values)


def run(backend: str) -> dict[str, Cells]:
    """For each file of tests what is said of a row and column."""
    found: dict[str, Cells] = {}
    for tests in (TESTS, TESTS_OF_OTHERS):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "", tests]
            subprocess.run(
                [*command, "-o", "junit_family=xunit1", f"--junitxml={report}"],
                cwd=ROOT,
                env=os.environ | {"KERAS_BACKEND": backend},
                check=False,
            )
            found[tests] = read(report)
    return found


def read(report: Path) -> Cells:
    """Whether each (row, column) passed, and what tests recorded of it."""
    cells: Cells = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"test_(\w+)\[(\w+)\]", case.get("name") or "")
        if match:
            column, row = match.groups()
            failed = any(case.find(k) is not None for k in ("failure", "error"))
            cells[row, column] = "no" if failed else "yes"
            for entry in case.iter("property"):
                cells[row, entry.get("name") or ""] = entry.get("value") or ""
    return cells


def table(results: dict[str, Cells], columns: dict[str, str]) -> list[str]:
    """The lines of a table, of what the backends say."""
    lines = [
        f"| | {' | '.join(columns.values())} |\n",
        "|---|" + len(columns) * "---|" + "\n",
    ]
    for row in sorted({row for cells in results.values() for row, _ in cells}):
        texts = [cell(results, row, column) for column in columns]
        lines.append(f"| `{row}` | {' | '.join(texts)} |\n")
    return lines


def cell(results: dict[str, Cells], row: str, column: str) -> str:
    """What all backends say, or each of them."""
    texts = {k: cells.get((row, column), "") for k, cells in results.items()}
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


if __name__ == "__main__":
    sys.exit(main())
