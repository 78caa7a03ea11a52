import json
import math
import re
import runpy
import sys

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

import keras_iris
from keras_iris.cli import main
from keras_iris.data import Example
from keras_iris.evaluation import (
    read_metrics,
    report,
    score_mode,
    scores_table,
)
from keras_iris.evaluation.plots import (
    draw,
    draw_svg,
    make_plots,
    running_mean,
)
from keras_iris.evaluation.run_record import RunRecord, read_runs
from keras_iris.evaluation.tables import (
    compare,
    format_number,
    make_tables,
    what_came_out,
)
from keras_iris.metrics import ExampleScore

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
        "gap": 0.8 / iteration,
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


def record(*lines, name="this run", **manifest):
    manifest = {"execution": {}, **manifest}
    return RunRecord(name, list(lines), manifest)


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


def test_missing_folder(tmp_path):
    expected = r"Expected a run's folder, .*metrics.jsonl.*Received: .*nowhere"
    for function in (read_metrics, report, scores_table):
        with pytest.raises(ValueError, match=expected):
            function(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="Expected a run's folder"):
        report(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", "1", '{"settings": 3}', '{"score_modes": {"a": "up"}}'),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_damaged_manifest(run_dir, text):
    (run_dir / "manifest.json").write_text(text)
    expected = "Expected a JSON object in .*manifest.*Delete the file"
    with pytest.raises(ValueError, match=expected):
        report(run_dir)


def test_sub_folder_that_is_no_run_is_left_out(run_dir):
    (run_dir / "other_tool").mkdir()
    (run_dir / "other_tool" / "metrics.jsonl").write_text("a\nb\n")
    with pytest.warns(UserWarning, match="Left out of the report: .*JSON"):
        _, others = read_runs(run_dir)
    assert [other.name for other in others] == ["control"]


def test_home_folder(run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert len(read_metrics("~/run")) == len(read_metrics(run_dir))
    assert scores_table("~/run") == scores_table(run_dir)
    assert report("~/run") == run_dir / "report.html"


# --- which way is better


@pytest.mark.parametrize(
    "names, expected",
    [
        ("word_accuracy exact_match exact_match,strict-match f1 val_f1", "max"),
        ("bleu BLEU-4 rougeL win_rate winrate mmlu mmlu_stem acc", "max"),
        ("acc_norm,none pass@1 gsm8k em token_f1 macro_recall", "max"),
        ("nll_per_token real_nll perplexity ppl loss val_loss", "min"),
        ("phoneme_error_rate error wer bits_per_byte", "min"),
        # A growing margin isn't progress; nor are those quality.
        ("margin margin_accuracy real_log_ratio synthetic_log_ratio", None),
        ("alpha gap nll_gap divergence real_ess synthetic_ess", None),
        ("synthetic_nll acc_stderr accuracy_std", None),
        # Names that say nothing, and those that speak of both.
        ("answer_length fact temper accuracy_loss", None),
    ],
)
def test_score_mode(names, expected):
    assert {name: score_mode(name) for name in names.split()} == dict.fromkeys(
        names.split(), expected
    )


def test_users_score_mode_counts_first():
    modes = {"answer_length": "min", "word_accuracy": "min", "margin": "max"}
    assert {name: score_mode(name, modes) for name in modes} == modes
    assert score_mode("nll", modes) == "min"


@pytest.mark.parametrize("modes", [{"f1": "up"}, {"f1": None}, "max", ["f1"]])
def test_wrong_score_modes(modes):
    with pytest.raises(ValueError, match="'min' or 'max'.*Received: .*Leave"):
        score_mode("nll", modes)


def keep_examples(folder, iteration, **scores):
    """What `SelfPlay` keeps of scores that remember their examples."""
    arrays = {
        f"{name}.{part}": getattr(ExampleScore(values), part)
        for name, values in scores.items()
        for part in ("values", "weights")
    }
    (folder / "evaluations").mkdir(parents=True, exist_ok=True)
    file = f"evaluations/iteration_{iteration:03d}.safetensors"
    save_file(arrays, folder / file)


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


# --- words and tables


def test_words():
    run = record(evaluation(0, f1=1.0), evaluation(1, f1=2.0))
    same = record(*run.lines, name="same")
    (caution,) = what_came_out(run, [same])
    assert "a single one: a difference can be chance" in caution
    longer = record({**evaluation(1, f1=1.0), "step": 9}, name="other")
    assert what_came_out(run, [same, longer, record()])[0] == (
        "Not trained equally long until iteration 1: this run 4 steps, other 9."
    )
    unfinished = record(*run.lines, execution={"iterations": 3})
    text = what_came_out(unfinished, [])
    assert text[0] == "The run isn't finished: 1 of 3 iterations."
    assert "There is no run to compare with" in text[1]
    (text,) = what_came_out(record(), [same])
    assert "quality can't be judged" in text


def test_tables(run_dir):
    scores, training, timing = make_tables(*read_runs(run_dir))
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


# --- plots


def test_plots_show_the_values_of_the_run(run_dir):
    plots = make_plots(*read_runs(run_dir))
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
    plots = make_plots(*read_runs(run_dir))
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
    panel = make_plots(*read_runs(run_dir))["scores"][0]
    assert " _b$x^2$</text>" in draw_svg(panel)


def test_drawing_leaves_matplotlib_as_it_was(run_dir):
    import matplotlib

    def state():
        return dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules

    before = state()
    draw_svg(make_plots(*read_runs(run_dir))["margin"][0])
    assert state() == before


def test_values_that_are_not_finite_are_drawn_around(tmp_path):
    lines = [step_line(1, i + 1) for i in range(80)]
    lines[0]["alpha"] = lines[40]["margin"] = math.nan
    lines[79]["real_log_ratio"] = math.inf
    write_lines(tmp_path, [*lines, evaluation(1, nll=math.nan, bleu=0.0)])
    report(tmp_path)
    assert "nan" in scores_table(tmp_path)


def test_running_mean():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    np.testing.assert_allclose(
        running_mean(values, 3), [1.5, 3.0, 4.0, 5.0, 4.0]
    )
    np.testing.assert_array_equal(running_mean(values, 1), values)
    np.testing.assert_allclose(running_mean(values[:2], 9), [1.5, 1.5])
    assert np.isnan(running_mean(np.array([np.nan]), 3)).all()


@pytest.mark.parametrize("num_steps, window", [(59, 1), (60, 3), (300, 11)])
def test_long_runs_have_a_running_mean(num_steps, window):
    run = record(*(step_line(1, i + 1) for i in range(num_steps)))
    (ax,) = draw(make_plots(run, [])["alpha_and_gap"][1:]).axes
    # Without the lines at 0 and at the iteration's start.
    curves = [line.get_ydata() for line in ax.get_lines()[:-2]]
    assert len(curves) == (1 if window == 1 else 2)
    values = 2.0 - 0.1 * np.arange(1, num_steps + 1)
    np.testing.assert_allclose(curves[-1], running_mean(values, window))


# --- the page


def test_report_writes_one_page_and_the_plots(run_dir):
    path = report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    plots = ["alpha_and_gap", "ess_and_nll", "margin", "scores"]
    files = sorted((run_dir / "plots").iterdir())
    assert [file.name for file in files] == [f"{name}.png" for name in plots]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    # One picture for light and dark; nothing from elsewhere.
    assert html.count("<svg") == html.count("</svg>") == 8
    assert "<img" not in html and "@import" not in html
    assert not re.search(r"""(src|srcset|href)=["'](?!#)""", html)
    assert not re.search(r"url\((?!#)", html)
    body = html[html.index("<body>") :]
    assert not re.search("#[0-9a-f]{6}[;\"']", body), "not the page's colour"
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_report_says_what_the_run_is(run_dir):
    html = report(run_dir).read_text(encoding="utf-8")
    for text in ("A title", "What came out", "6,789", "2026-01-02", "Versions"):
        assert text in html
    row = r"<td>callbacks</td><td>\s*AlphaScheduler, CSVLogger\s*</td>"
    assert re.search(row, html[html.index("<summary>Execution") :])
    row = r"<td>optimizer</td><td>\s*{[^<]*0.001[^<]*adam[^<]*}\s*</td>"
    assert re.search(row, html[html.index("<summary>Settings") :])
    assert re.search(r"<td>template</td><td>\s*-\s*</td>", html)
    caption = re.search("<figcaption>(The gap is .*?)</figcaption>", html)[1]
    assert "a lower bound of the Rényi divergence of order 2" in caption
    assert "alpha = 1 + c * gap" in caption
    assert "effective sample size would get too small" in caption


def test_a_growing_margin_is_never_called_better(run_dir):
    for folder, growth in ((run_dir, 2.0), (run_dir / "control", 1.0)):
        lines = [evaluation(i, margin=i * growth) for i in range(3)]
        write_lines(folder, lines)
    text = scores_table(run_dir) + report(run_dir).read_text(encoding="utf-8")
    assert "+4.0000" in text and "no verdict" in text
    for word in ("better than", "worse than", "is better)"):
        assert word not in text


def test_text_is_escaped(run_dir):
    bad = '<script>alert("1")</script>&$'
    settings = {bad: bad, "list": [bad], "object": {bad: bad}}
    manifest = {"title": bad, "created": bad, "settings": settings}
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(evaluation(2, **{bad: 1.0})) + "\n")
    html = report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;&amp;$" in html


def test_report_of_a_run_that_has_just_started(tmp_path):
    write_lines(tmp_path, [])
    html = report(tmp_path).read_text(encoding="utf-8")
    assert "quality can&#39;t be judged" in html
    write_lines(tmp_path, [score_line("run", 0), step_line(1, 1)])
    assert f"<h1>{tmp_path.name}</h1>" in report(tmp_path).read_text("utf-8")
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


# --- answers


def write_answers(folder, **texts):
    folder.mkdir(exist_ok=True)
    lines = [
        {"iteration": i, "number": 0, "prompt": "p <b>", "annotated": "a"}
        | {"answer": text}
        for i, text in enumerate(texts.values())
    ]
    others = [{**lines[0], "iteration": 2, "answer": 5}, {"number": "0"}, 7]
    lines = [*map(json.dumps, [*lines, *others]), '{"iteration": 7, "num']
    text = "\n".join(lines).encode() + b"\xff\n" + 100_000 * b"["
    (folder / "answers.jsonl").write_bytes(text)


def test_answers(run_dir, capsys):
    assert main(["samples", str(run_dir)]) == 2
    assert "has no answers" in capsys.readouterr().err
    write_answers(run_dir, before="x", after="y\nz")
    write_answers(run_dir / "control", before="x", after="w")
    assert main(["samples", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["prompt", "'p <b>'"],
        ["annotated", "'a'"],
        ["before", "'x'"],
        ["iteration", "1  'y\\nz'"],
        ["control", "'w'"],
    ]
    page = report(run_dir).read_text()
    assert "<td>p &lt;b&gt;</td>" in page and "<td>y\nz</td>" in page


def test_held_out(checkpoint, tmp_path):
    """NLL against a loop over examples; answers against `argmax`."""
    causal_lm = keras_iris.load(checkpoint("qwen2"), dtype="float32")
    tokenizer = causal_lm.tokenizer
    rows = [("How are you?", "Fine."), ("And you, my friend?", "Very well.")]
    examples = [
        Example(*(np.array(tokenizer.encode(t), "int32") for t in row))
        for row in rows
    ]
    model = keras_iris.SelfPlayModel(causal_lm)
    held_out = keras_iris.evaluation.HeldOut(
        examples, batch_size=2, max_new_tokens=3
    )
    scores = held_out(model)
    total, count = 0.0, 0
    for example, answer in zip(examples, scores.answers, strict=True):
        ids = np.concatenate([example.prompt_ids, example.response_ids])
        log_probs = _log_probs(causal_lm, ids)
        start = len(example.prompt_ids)
        for place in range(start, len(ids)):
            total -= log_probs[place - 1, ids[place]]
            count += 1
        ids = example.prompt_ids
        for _ in range(3):
            ids = np.append(ids, _log_probs(causal_lm, ids)[-1].argmax())
            if ids[-1] in tokenizer.end_token_ids:
                break
        assert answer["answer"] == tokenizer.decode(ids[start:].tolist())
        assert answer["prompt"] == tokenizer.decode(example.prompt_ids)
    np.testing.assert_allclose(scores["nll_per_token"], total / count, 1e-4)
    causal_lm.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        held_out(model)


def _log_probs(causal_lm, ids):
    inputs = {
        "token_ids": np.array([ids], "int32"),
        "padding_mask": np.ones((1, len(ids)), "int32"),
    }
    logits = keras.ops.convert_to_numpy(causal_lm(inputs))[0].astype("float64")
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_held_out_without_examples():
    with pytest.raises(ValueError, match="needs examples .* Received: none"):
        keras_iris.evaluation.HeldOut([], batch_size=8)
