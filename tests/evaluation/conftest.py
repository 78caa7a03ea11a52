import json

import pytest
from evaluation_helpers import (
    STEPS,
    score_line,
    step_line,
    write_lines,
)


@pytest.fixture
def run_dir(tmp_path):
    """Two iterations of four steps, a control and a manifest."""
    lines = [score_line("run", 0)]
    for iteration in (1, 2):
        first = (iteration - 1) * STEPS + 1
        lines += [step_line(iteration, first + i) for i in range(STEPS)]
        lines.append(
            {
                "kind": "iteration",
                "iteration": iteration,
                "generate_seconds": 12.3,
                "generated_tokens": 1000,
                "score_seconds": 4.5,
                "fit_seconds": 123.4,
                "tokens_per_second": 6789.0,
                "gap": 0.8 / iteration,
            }
        )
        lines.append(score_line("run", iteration))
    folder = tmp_path / "run"
    write_lines(folder, lines)
    control = [score_line("control", iteration) for iteration in range(3)]
    write_lines(folder / "control", control)
    manifest = {
        "title": "A title",
        "created": "2026-01-02T03:04:05+0000",
        "settings": {
            "optimizer": {"name": "adam", "learning_rate": 1e-3},
            "template": None,
        },
        "execution": {
            "iterations": 2,
            "callbacks": ["AlphaScheduler", "CSVLogger"],
        },
        "versions": {"keras": "3.15.1"},
        "score_modes": {"answer_length": "max"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
