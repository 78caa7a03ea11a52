import math
import sys

import numpy as np
import pytest
from evaluation_helpers import (
    NLL,
    STEPS,
    evaluation,
    record,
    step_line,
    write_lines,
)

from keras_iris.evaluation import report, scores_table
from keras_iris.evaluation.plots import draw, draw_svg, make_plots
from keras_iris.evaluation.run_record import read_run


def test_plots_show_the_values_of_the_run(run_dir):
    plots = make_plots(read_run(run_dir))
    assert {name: [p.title for p in plots[name]] for name in plots} == {
        "scores": [
            "nll_per_token (lower is better)",
            "word_accuracy (higher is better)",
        ],
        "alpha_and_gap": ["gap (nats)", "order alpha"],
        "ess_and_nll": [
            "effective sample size (share)",
            "NLL (nats per token)",
        ],
        "margin": ["margin (nats)", "log-ratio (nats)"],
    }
    ess = plots["ess_and_nll"][0]
    assert list(ess.curves) == ["real_ess", "synthetic_ess"]
    first, second = ess.curves["synthetic_ess"]
    np.testing.assert_array_equal(first[:2], [[1] * 4, [1, 2, 3, 4]])
    np.testing.assert_allclose(second[2], [1 / 5, 1 / 6, 1 / 7, 1 / 8])
    for name, own in (("this run", "run"), ("control", "control")):
        ((_, steps, values),) = plots["scores"][0].curves[name]
        assert steps.tolist() == [0, STEPS, 2 * STEPS]
        assert values.tolist() == NLL[own]


def test_drawn_lines_and_boundaries(run_dir):
    plots = make_plots(read_run(run_dir))
    gap, alpha = draw(plots["alpha_and_gap"]).axes
    assert gap.get_ylim()[0] == 0  # as 0.4 is near to it, beside 0.8
    first, second, *boundaries = alpha.get_lines()
    np.testing.assert_allclose(first.get_ydata(), [1.9, 1.8, 1.7, 1.6])
    np.testing.assert_array_equal(second.get_xdata(), [5, 6, 7, 8])
    assert [line.get_xdata()[0] for line in boundaries] == [0.5, 4.5]
    assert [text.get_text() for text in alpha.texts] == ["1", "2"]
    nll, accuracy = draw(plots["scores"]).axes
    np.testing.assert_array_equal(nll.get_lines()[0].get_ydata(), NLL["run"])
    legend = accuracy.get_legend()
    assert [t.get_text().strip() for t in legend.get_texts()] == [
        "this run",
        "control",
    ]


def test_labels_are_taken_as_they_are(run_dir):
    (run_dir / "control").rename(run_dir / "_b$x^2$")
    panel = make_plots(read_run(run_dir))["scores"][0]
    assert " _b$x^2$</text>" in draw_svg(panel)


def test_drawing_leaves_matplotlib_as_it_was(run_dir):
    import matplotlib

    def state():
        return dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules

    before = state()
    draw_svg(make_plots(read_run(run_dir))["margin"][0])
    assert state() == before


def test_values_that_are_not_finite_are_drawn_around(tmp_path):
    lines = [step_line(1, i + 1) for i in range(80)]
    lines[0]["alpha"] = lines[40]["margin"] = math.nan
    lines[79]["real_log_ratio"] = math.inf
    write_lines(tmp_path, [*lines, evaluation(1, nll=math.nan, bleu=0.0)])
    report(tmp_path)
    assert "nan" in scores_table(tmp_path)


@pytest.mark.parametrize("num_steps, window", [(59, 1), (60, 3), (300, 11)])
def test_long_runs_have_a_running_mean(num_steps, window):
    run = record(*(step_line(1, i + 1) for i in range(num_steps)))
    (ax,) = draw(make_plots(run)["alpha_and_gap"][1:]).axes
    # Without the lines at 0 and at the iteration's start.
    curves = [line.get_ydata() for line in ax.get_lines()[:-2]]
    assert len(curves) == (1 if window == 1 else 2)
    values = 2.0 - 0.1 * np.arange(1, num_steps + 1)
    around = np.pad(values, window // 2, constant_values=np.nan)
    around = np.lib.stride_tricks.sliding_window_view(around, window)
    np.testing.assert_allclose(curves[-1], np.nanmean(around, axis=1))
