import math
import re

import numpy as np
import pytest
from evaluation_helpers import (
    evaluation,
    keep_examples,
    record,
    step_line,
    write_lines,
)

from keras_iris.evaluation import scores_table
from keras_iris.evaluation.run_record import read_run
from keras_iris.evaluation.tables import (
    compare,
    format_number,
    make_tables,
    what_came_out,
)
from keras_iris.metrics import ExampleScore


@pytest.mark.parametrize(
    "score, value, reference, expected",
    [
        ("nll", 0.9, 1.0, ["no verdict", "-0.1000", "-"]),
        ("margin", 9.0, 1.0, ["no verdict", "+8.0000", "-"]),
        ("nll", math.nan, 1.0, ["not comparable", "-", "-"]),
        ("nll", 1.0, math.inf, ["not comparable", "-", "-"]),
    ],
)
def test_compare_without_examples(score, value, reference, expected):
    run = record(evaluation(1, **{score: value}))
    other = record(evaluation(1, **{score: reference}), name="other")
    assert compare(run, other, score) == expected


NOISE = np.random.default_rng(0).normal(size=(2, 400))


@pytest.mark.parametrize(
    "score, shift, expected",
    [
        ("nll", -0.5, "better than other"),
        ("nll", 0.5, "worse than other"),
        ("nll", 0.0, "can't be told from other"),
        ("f1", -0.5, "worse than other"),
        ("f1", 0.5, "better than other"),
        ("length", 0.5, "no verdict"),
    ],
)
def test_compare_by_examples(score, shift, expected, tmp_path):
    ours, theirs = NOISE[0] + shift, NOISE[1]
    keep_examples(tmp_path / "a", 1, **{score: ours})
    keep_examples(tmp_path / "b", 1, **{score: theirs})
    run = record(evaluation(1, **{score: ours.mean()}))
    other = record(evaluation(1, **{score: theirs.mean()}), name="other")
    run = run._replace(folder=tmp_path / "a")
    other = other._replace(folder=tmp_path / "b")
    verdict, difference, interval = compare(run, other, score)
    assert verdict == expected
    low, high = map(float, interval.split(" to "))
    # The normal approximation is the oracle.
    error = (ours - theirs).std() / np.sqrt(len(ours))
    mean = (ours - theirs).mean()
    np.testing.assert_allclose(float(difference), mean, atol=1e-4)
    ends = [mean - 1.96 * error, mean + 1.96 * error]
    np.testing.assert_allclose([low, high], ends, atol=0.3 * error)


def test_scores_of_other_examples_have_no_verdict(tmp_path):
    """They are of as many, but of other lengths."""
    keep_examples(tmp_path / "a", 1, nll=ExampleScore(NOISE[0], [2] * 400))
    keep_examples(tmp_path / "b", 1, nll=ExampleScore(NOISE[0] - 9, [3] * 400))
    run, other = (
        record(evaluation(1, nll=float(i)), name=name)._replace(
            folder=tmp_path / name
        )
        for i, name in enumerate("ab")
    )
    assert compare(run, other, "nll") == ["no verdict", "-1.0000", "-"]


def test_a_score_of_zero_has_a_verdict(tmp_path):
    keep_examples(tmp_path, 0, f1=[0.0] * 4)
    keep_examples(tmp_path, 1, f1=[1.0] * 4)
    run = record(evaluation(0, f1=0.0), evaluation(1, f1=1.0))
    run = run._replace(folder=tmp_path)
    assert compare(run, run, "f1")[0] == "better than its start"


def test_scores_that_are_no_scores_of_examples():
    assert ExampleScore([1.0, 5.0], [1, 2]) == 2.0
    for values, weights in (([], None), ([1.0], [1.0, 2.0]), ([[1.0]], None)):
        with pytest.raises(ValueError, match="value and weight for each"):
            ExampleScore(values, weights)


def test_compare_with_the_users_mode(tmp_path):
    for i, values in enumerate(([4.0, 4.1], [3.0, 3.1])):
        keep_examples(tmp_path, i, length=values)
    lines = evaluation(0, length=4.05), evaluation(1, length=3.05)
    run = record(*lines, score_modes={"length": "min"})
    expected = ["better than its start", "-1.0000", "-1.0000 to -1.0000"]
    run = run._replace(folder=tmp_path)
    assert compare(run, run, "length") == expected


def test_compare_at_the_last_common_iteration():
    run = record(*(evaluation(i, f1=0.1 * i) for i in range(4)))
    other = record(evaluation(0, f1=0.0), evaluation(1, f1=0.2), name="other")
    expected = ["no verdict (iteration 1)", "-0.1000", "-"]
    assert compare(run, other, "f1") == expected
    for behind in (record(evaluation(0, f1=0.2)), record()):
        assert compare(run, behind, "f1") == ["-", "-", "-"]


def test_words():
    run = record(evaluation(0, f1=1.0), evaluation(1, f1=2.0))
    same = record(*run.lines, name="same")
    (caution,) = what_came_out(run._replace(others=[same]))
    assert "a single one: a difference can be chance" in caution
    longer = record({**evaluation(1, f1=1.0), "step": 9}, name="other")
    compared = run._replace(others=[same, longer, record()])
    assert what_came_out(compared)[0] == (
        "Not trained equally long until iteration 1: this run 4 steps, other 9."
    )
    unfinished = record(*run.lines, execution={"iterations": 3})
    text = what_came_out(unfinished)
    assert text[0] == "The run isn't finished: 1 of 3 iterations."
    assert "There is no run to compare with" in text[1]
    (text,) = what_came_out(record(others=[same]))
    assert "quality can't be judged" in text


def test_tables(run_dir):
    scores, training, timing = make_tables(read_run(run_dir))
    assert scores.header[-3:] == ["0", "1", "2"]
    assert scores.rows[:2] == [
        ["nll_per_token (lower is better)", "this run", "no verdict"]
        + ["-0.1000", "-", "0.5000", "0.4500", "0.4000"],
        ["", "control", "no verdict"]
        + ["-0.0400", "-", "0.5000", "0.4600", "0.4400"],
    ]
    assert scores.rows[3][1:4] == ["control", "no verdict", "-0.0400"]
    # Means of alpha, gap, margin at steps 1 to 4.
    assert training.header == [
        *("iteration", "alpha", "gap", "margin", "margin_accuracy"),
        *("real_ess", "synthetic_ess", "real_nll", "synthetic_nll"),
    ]
    assert training.rows[0] == [
        *("1", "1.7500", "0.8000", "1.2500", "0.7500"),
        *("0.9000", "0.5208", "0.5000", "0.2000"),
    ]
    assert timing.rows[1] == ["1", "12.3", "4.5", "123.4", "6,789.0", "1.5"]


def test_scores_table_is_aligned_text(run_dir):
    lines = scores_table(run_dir).split("\n")
    header, line, row = lines[1:4]
    assert len(header) == len(line) == len(row)
    assert header.index("run") == row.index("this run")
    assert lines[0] == "Held-out scores" and "can be chance" in lines[-1]


def test_run_that_only_trains(tmp_path):
    write_lines(tmp_path, [{"kind": "step", "iteration": 1, "step": 1}])
    assert "can't be judged" in scores_table(tmp_path)
    write_lines(tmp_path, [{**step_line(1, i), "gap": 0.1} for i in (1, 2)])
    assert "Held-out" not in scores_table(tmp_path)
    assert re.search(r"^1 +1\.8500 +0\.1000", scores_table(tmp_path), re.M)


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (-12.345, "-12.35"),
        (12345.6, "12,346"),
        (0.00012, "1.2e-04"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text
