import json
import re

import pytest
from evaluation_helpers import step_line, write_lines

from keras_iris.evaluation import read_metrics


def test_last_line_of_the_same_step_wins(tmp_path):
    lines = [step_line(1, 1), step_line(1, 2), {**step_line(1, 1), "loss": 7.0}]
    write_lines(tmp_path, lines)
    read = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in read] == [
        (1, 7.0),
        (2, -0.2),
    ]
    assert read_metrics(tmp_path / "metrics.jsonl") == read


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_truncated_last_line_is_skipped(tmp_path, kept):
    write_lines(tmp_path, [step_line(1, 1)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step_line(1, 2))[:kept])
    assert read_metrics(tmp_path) == [step_line(1, 1)]


def test_line_after_a_truncated_one_is_found(tmp_path):
    # A resumed run goes on in the line that the kill cut off.
    cut = json.dumps(step_line(1, 2))[:30]
    lines = [json.dumps(step_line(1, 1)), cut + json.dumps(step_line(1, 2))]
    lines.append(json.dumps(step_line(1, 3)))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_metrics(tmp_path) == [step_line(1, i) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "bad",
    [
        "spilled ink",
        "[1]",
        '"kind"',
        '{"kind": "step", "alpha": 1}',
        '{"kind": "evaluation", "x": 1}',
        '{"kind": ["step"]}',
        pytest.param(f'{{"kind": "a", "x": {"9" * 400}}}', id="400 digits"),
        pytest.param(f'{{"kind": "a", "x": {"9" * 5000}}}', id="5000 digits"),
        pytest.param('{"kind": ' * 100_000, id="deep"),
        '{"kind": "step", "iteration": 1, "step": 9, "alpha": "a"}',
    ],
)
def test_damaged_line_in_the_middle(tmp_path, bad):
    text = f"{bad}\n{json.dumps(step_line(1, 1))}\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    expected = f"line 1 of .*{re.escape(bad[:40])}.*Delete"
    with pytest.raises(ValueError, match=expected):
        read_metrics(tmp_path)
