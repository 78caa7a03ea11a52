"""Writes docs/architectures.md from the tests of the table of architectures.

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
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", ""]  # slow ones, too
TESTS = "tests/hub/test_architectures.py"
BACKENDS = {"jax": "JAX", "torch": "PyTorch", "tensorflow": "TensorFlow"}
# A test's name, and what it shows.
COLUMNS = {
    "loads": "loads",
    "logits": "logits",
    "generates": "generates",
    "trains_and_exports": "trains, exports",
    "exports_without_source": "exports without source",
    "adapters": "adapters",
    "refuses_what_it_does_not_know": "refuses unknown entries",
}
HEAD = """\
# Architectures

Written by `make matrix` from the results of
`tests/hub/test_architectures.py`; don't edit it.

Each row is a `model_type` of config.json that `keras_iris.load` reads
exactly. The tests take tiny random checkpoints whose config.json has no
default value in any entry that the model reads. Logits are those of
transformers to 1e-5, 64 greedy tokens are the same, one step of training
gives the weights that PyTorch's gives to 1e-5, and the exported folder has
the same logits in transformers. An entry that keras_iris doesn't know, or
that KerasHub doesn't compute, is an error at `load` that names it.

Other architectures that KerasHub converts pass through it: `load` compares
their log-probs for a few tokens with those of transformers where that is
installed, and they train and generate in this process, but can't be exported.

"""


def main() -> int:
    """Runs the tests of each backend and writes the table."""
    results = {backend: run(backend) for backend in BACKENDS}
    rows = sorted({row for cells in results.values() for row, _ in cells})
    lines = [
        f"| | {' | '.join(COLUMNS.values())} |",
        "|---|" + len(COLUMNS) * "---|",
    ]
    for row in rows:
        cells = [cell(results, row, column) for column in COLUMNS]
        lines.append(f"| `{row}` | {' | '.join(cells)} |")
    lines += ["", "Backends: " + ", ".join(BACKENDS.values()) + ".", ""]
    text = HEAD + "\n".join(lines)
    (ROOT / "docs" / "architectures.md").write_text(text)
    passed = [ok for cells in results.values() for ok in cells.values()]
    return 0 if passed and all(passed) else 1


def run(backend: str) -> dict[tuple[str, str], bool]:
    """Whether each (row, column) passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                TESTS,
                f"--junitxml={report}",
            ],
            cwd=ROOT,
            env=os.environ | {"KERAS_BACKEND": backend},
            check=False,
        )
        tree = ElementTree.parse(report)
    found = {}
    for case in tree.iter("testcase"):
        match = re.fullmatch(r"test_(\w+)\[(\w+)\]", case.get("name") or "")
        if match:
            failed = any(case.find(k) is not None for k in ("failure", "error"))
            found[match[2], match[1]] = not failed
    return found


def cell(
    results: dict[str, dict[tuple[str, str], bool]], row: str, column: str
) -> str:
    """Yes, or the backends on which it isn't so."""
    failed = [
        name
        for backend, name in BACKENDS.items()
        if not results[backend].get((row, column))
    ]
    return f"not on {', '.join(failed)}" if failed else "yes"


if __name__ == "__main__":
    sys.exit(main())
