import json
import math
import re
import runpy
import sys

import numpy as np
import pytest

from keras_iris.cli import main
from keras_iris.evaluation import read_metrics, report, scores_table
from keras_iris.evaluation.figures import DARK, LIGHT, draw, draw_png, spread
from keras_iris.evaluation.outcome import Outcome, compare, direction
from keras_iris.evaluation.panels import (
    Curve,
    Segment,
    iteration_starts,
    make_plots,
    mean_window,
    running_mean,
    step_curve,
)
from keras_iris.evaluation.run_record import (
    RunRecord,
    read_comparisons,
    read_run,
)
from keras_iris.evaluation.tables import format_number, score_table
from keras_iris.evaluation.words import what_came_out

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
STEPS = 4  # of an iteration
# By iteration: 0 is before self-play.
NLL = {"run": [0.50, 0.45, 0.40], "control": [0.50, 0.46, 0.44]}
ACCURACY = {"run": [0.30, 0.31, 0.32], "control": [0.30, 0.32, 0.36]}


def evaluation(iteration, **scores):
    step = iteration * STEPS
    place = {"kind": "evaluation", "iteration": iteration, "step": step}
    return {**place, "seconds": 1.5, **scores}


def step_line(iteration, step):
    return {
        "kind": "step",
        "iteration": iteration,
        "step": step,
        "seconds": 0.1,
        "loss": -0.1 * step,
        "alpha": 2.0 - 0.1 * step,
        "gap": 0.3 - 0.01 * step,
        "margin": 0.5 * step,
        "margin_accuracy": 0.75,
        "real_ess": 0.9,
        "synthetic_ess": 1.0 / step,
        "real_log_ratio": 0.2 * step,
        "synthetic_log_ratio": -0.3 * step,
        "real_nll": 0.5,
        "synthetic_nll": 0.2,
    }


def write_lines(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def score_line(run, iteration):
    return evaluation(
        iteration,
        nll_per_token=NLL[run][iteration],
        word_accuracy=ACCURACY[run][iteration],
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
                "score_seconds": 4.5,
                "fit_seconds": 123.4,
                "tokens_per_second": 6789.0,
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
        "settings": {"iterations": 2, "callbacks": ["AlphaScheduler"]},
        "versions": {"keras": "3.15.1"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read_all(run_dir):
    return read_run(run_dir, "this run"), read_comparisons(run_dir)


def plots_by_name(run_dir):
    return {plot.name: plot for plot in make_plots(*read_all(run_dir))}


# --- reading


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


def test_damaged_line_in_the_middle(tmp_path):
    for bad in (
        "spilled ink",
        '{"kind": "step", "alpha": 1}',
        '{"kind": "evaluation", "x": 1}',
        '{"kind": "step", "iteration": 1, "step": 9, "alpha": "a"}',
    ):
        text = f"{bad}\n{json.dumps(step_line(1, 1))}\n"
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=f"line 1 of .*{bad}.*Delete"):
            read_metrics(tmp_path)


def test_missing_folder(tmp_path):
    expected = r"Expected a run's folder, .*metrics.jsonl.*Received: .*nowhere"
    for function in (read_metrics, report, scores_table):
        with pytest.raises(ValueError, match=expected):
            function(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Expected a run's folder"):
        report(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "1"])
def test_damaged_manifest(run_dir, text):
    (run_dir / "manifest.json").write_text(text)
    with pytest.raises(
        ValueError, match="Expected a JSON object in .*manifest"
    ):
        report(run_dir)


# --- what the plots show


def test_step_curve_has_a_segment_for_each_iteration(run_dir):
    curve = step_curve(read_metrics(run_dir), "margin", "margin")
    assert [s.steps.tolist() for s in curve.segments] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    np.testing.assert_allclose(
        np.concatenate([s.values for s in curve.segments]),
        0.5 * np.arange(1, 9),
    )


def test_iteration_starts(run_dir):
    assert iteration_starts(read_metrics(run_dir)) == {1: 1, 2: 5}


def test_plots_show_the_values_of_the_run(run_dir):
    plots = plots_by_name(run_dir)
    assert set(plots) == {
        "scores",
        "alpha_and_gap",
        "effective_sample_size",
        "margin",
    }
    ess = plots["effective_sample_size"].panels[0]
    assert [curve.label for curve in ess.curves] == ["annotated", "synthetic"]
    np.testing.assert_allclose(
        ess.curves[1].segments[1].values, [1 / 5, 1 / 6, 1 / 7, 1 / 8]
    )
    labels = [[c.label for c in p.curves] for p in plots["margin"].panels]
    assert labels == [["margin"], ["annotated", "synthetic"]]
    for name, own in (("this run", "run"), ("control", "control")):
        curves = {c.label: c for c in plots["scores"].panels[0].curves}
        (segment,) = curves[name].segments
        assert segment.steps.tolist() == [0, STEPS, 2 * STEPS]
        assert segment.values.tolist() == NLL[own]


def test_drawn_lines_and_boundaries(run_dir):
    plots = plots_by_name(run_dir)
    alpha, gap = draw(plots["alpha_and_gap"], LIGHT).axes
    # The boundary between the iterations, then one line for each.
    boundary, first, second = alpha.get_lines()
    assert boundary.get_xdata()[0] == 4.5
    np.testing.assert_allclose(first.get_ydata(), [1.9, 1.8, 1.7, 1.6])
    np.testing.assert_array_equal(second.get_xdata(), [5, 6, 7, 8])
    assert [t.get_text() for t in alpha.texts] == ["iteration 1", "2"]
    nll, accuracy = draw(plots["scores"], DARK).axes
    assert nll.get_title(loc="left") == "nll_per_token\nlower is better"
    assert [t.get_text() for t in accuracy.texts] == ["this run", "control"]
    np.testing.assert_array_equal(nll.get_lines()[0].get_ydata(), NLL["run"])


def test_drawing_leaves_matplotlib_as_it_was(run_dir):
    import matplotlib

    def state():
        return dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules

    before = state()
    draw_png(plots_by_name(run_dir)["margin"], LIGHT)
    assert state() == before


def test_values_that_are_not_finite_are_drawn_around(tmp_path):
    lines = [step_line(1, i + 1) for i in range(80)]
    lines[0]["alpha"] = lines[40]["margin"] = math.nan
    lines[79]["real_log_ratio"] = math.inf
    write_lines(tmp_path, [*lines, evaluation(1, nll=math.nan, bleu=0.0)])
    for plot in make_plots(*read_all(tmp_path)):
        assert draw_png(plot, LIGHT).startswith(PNG_SIGNATURE)
    assert "nan" in scores_table(tmp_path)


def test_running_mean():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    np.testing.assert_allclose(
        running_mean(values, 3), [1.5, 3.0, 4.0, 5.0, 4.0]
    )
    np.testing.assert_array_equal(running_mean(values, 1), values)
    np.testing.assert_allclose(running_mean(values[:2], 9), [1.5, 1.5])
    assert np.isnan(running_mean(np.array([np.nan]), 3)).all()


@pytest.mark.parametrize("steps, window", [(1, 1), (59, 1), (60, 3), (300, 11)])
def test_mean_window_is_odd(steps, window):
    segment = Segment(np.arange(steps), np.zeros(steps))
    assert mean_window(Curve("", [segment])) == window


def test_labels_are_spread():
    assert spread([0.0, 5.0], 1.0) == [0.0, 5.0]
    np.testing.assert_allclose(spread([1.0, 1.0, 1.0], 2.0), [-1.0, 1.0, 3.0])
    np.testing.assert_allclose(spread([5.0, 4.6, 0.0], 1.0), [5.3, 4.3, 0.0])


# --- words and tables


@pytest.mark.parametrize(
    "score, expected",
    [
        ("word_accuracy", "higher"),
        ("margin", "higher"),
        ("nll_per_token", "lower"),
        ("phoneme_error_rate", "lower"),
        ("perplexity", "lower"),
        ("bleu", ""),
    ],
)
def test_direction(score, expected):
    assert direction(score) == expected


@pytest.mark.parametrize(
    "score, value, reference, verdict",
    [
        ("nll", 0.9, 1.0, "better"),
        ("nll", 1.1, 1.0, "worse"),
        ("nll", 1.009, 1.0, "level"),
        ("accuracy", 0.9, 1.0, "worse"),
        ("accuracy", 0.0, 0.0, "level"),
        ("margin", -0.5, -1.0, "better"),
        ("bleu", 0.9, 1.0, "lower"),
        ("nll", math.nan, 1.0, "not comparable"),
    ],
)
def test_verdict(score, value, reference, verdict):
    assert Outcome(score, 1, value, reference).verdict == verdict


def test_words_with_a_control(run_dir):
    text = "\n".join(what_came_out(*read_all(run_dir)))
    assert (
        "Against control, after iteration 2, this run ended better on "
        "nll_per_token; worse on word_accuracy." in text
    )
    assert (
        "- word_accuracy (higher is better): worse, 0.3200 against 0.3600, "
        "difference -0.0400 (-11.1%). Before self-play 0.3000: better now."
        in text
    )
    assert "whether it is significant" in text


def test_words_compare_at_the_last_common_iteration(run_dir):
    control = [score_line("control", iteration) for iteration in (0, 1)]
    write_lines(run_dir / "control", control)
    run, (other,) = read_all(run_dir)
    nll, accuracy = compare(run, other)
    assert (nll.iteration, nll.value, nll.reference) == (1, 0.45, 0.46)
    text = "\n".join(what_came_out(run, [other]))
    assert "Against control, after iteration 1, this" in text


def test_words_name_unequal_training():
    run = RunRecord("this run", [evaluation(1, nll=1.0)], {})
    longer = {**evaluation(1, nll=1.0), "step": 9}
    text = what_came_out(run, [RunRecord("other", [longer], {})])
    assert (
        "They had not trained equally long: this run 4 steps, other 9." in text
    )


def test_words_without_comparison_or_scores():
    lines = [evaluation(0, nll=1.0), evaluation(1, nll=2.0)]
    run = RunRecord("this run", lines, {"settings": {"iterations": 3}})
    text = "\n".join(what_came_out(run, []))
    assert "The run isn't finished: 1 of 3 iterations." in text
    assert (
        "Against its own start, after iteration 1, this run ended worse on nll."
        in text
    )
    assert "There is no run to compare with" in text
    (text,) = what_came_out(RunRecord("this run", [], {}), [])
    assert "quality can't be judged" in text


def test_score_table(run_dir):
    table = score_table(*read_all(run_dir))
    assert table.header[2:] == [
        "start",
        "iteration 1",
        "iteration 2",
        "difference",
    ]
    assert table.rows[2] == [
        "word_accuracy",
        "this run",
        "0.3000",
        "0.3100",
        "0.3200",
        "",
    ]
    assert table.rows[3][-1] == "-0.0400"


def test_scores_table_is_aligned_text(run_dir):
    text = scores_table(run_dir)
    header, _, row = text.split("\n")[1:4]
    assert header.index("start") + len("start") == row.index("0.5000") + 6
    # Mean alpha of steps 1 to 4; timing of the iteration.
    assert re.search(r"^1 +1\.7500 +0\.2750 +1\.2500", text, re.M)
    assert re.search(r"^1 +12\.3 +4\.5 +123 +6,789 +1\.5", text, re.M)
    assert "Against control" in text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (-12.345, "-12.35"),
        (12345.6, "12,346"),
        (0.00012, "1.2e-04"),
        (math.inf, "inf"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


# --- the page


def test_report_writes_one_page_and_the_plots(run_dir):
    path = report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    plots = sorted(file.name for file in (run_dir / "plots").iterdir())
    assert plots == [
        "alpha_and_gap.png",
        "effective_sample_size.png",
        "margin.png",
        "scores.png",
    ]
    for name in plots:
        data = (run_dir / "plots" / name).read_bytes()
        assert data.startswith(PNG_SIGNATURE)
    # Each plot for light and for dark; nothing from elsewhere.
    assert html.count("data:image/png;base64,") == 2 * len(plots)
    assert not re.search(r"""(src|srcset|href)=["'](?!data:)""", html)
    assert "url(" not in html and "@import" not in html
    for text in ("A title", "What came out", "AlphaScheduler", "6,789"):
        assert text in html


def test_text_is_escaped(run_dir):
    bad = '<script>alert("1")</script>&$'
    manifest = {"title": bad, "created": bad, "settings": {bad: bad}}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(evaluation(2, **{bad: 1.0})) + "\n")
    html = report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;$" in html


def test_report_of_a_run_that_has_just_started(tmp_path):
    write_lines(tmp_path, [])
    html = report(tmp_path).read_text(encoding="utf-8")
    assert "quality can&#x27;t be judged" in html
    write_lines(tmp_path, [score_line("run", 0), step_line(1, 1)])
    assert "A title" not in report(tmp_path).read_text(encoding="utf-8")
    assert (tmp_path / "plots" / "margin.png").exists()


def test_unwritable_folder(run_dir):
    (run_dir / "report.html").mkdir()
    with pytest.raises(ValueError, match="Expected to write the report into"):
        report(run_dir)


# --- the command


def test_command(run_dir, capsys):
    assert main(["report", str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report.html'}\n"


def test_command_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys):
    words = ["keras_iris", "report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("keras_iris", run_name="__main__")
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: Expected a run's folder")
