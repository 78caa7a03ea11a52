import json
import re
import runpy
import sys

import pytest
from evaluation_helpers import (
    evaluation,
    score_line,
    step_line,
    write_answers,
    write_lines,
)

from keras_iris.cli import main
from keras_iris.evaluation import report, scores_table


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
    call = f'keras_iris.export(causal_lm, "{run_dir / "model"}")'
    assert f"<pre>{call}</pre>" in html[html.index("<h2>Next") :]


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


def test_next_step(tmp_path):
    """The command for what a run's folder has."""

    def next_step():
        page = report(tmp_path).read_text(encoding="utf-8")
        return page[page.index("<h2>Next</h2>") :]

    config, model = tmp_path / "config.yaml", tmp_path / "model"
    manifest = {"execution": {"iterations": 2}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    write_lines(tmp_path, [])
    assert "program again" in next_step() and "<pre>" not in next_step()
    config.touch()
    assert f"<pre>keras-iris run {config}</pre>" in next_step()
    write_lines(tmp_path, [{"kind": "iteration", "iteration": 2}])
    command = f"keras-iris export {tmp_path} --out {model}"
    assert f"vLLM:</p>\n<pre>{command}</pre>" in next_step()
    config.unlink()
    call = f'keras_iris.export(causal_lm, "{model}")'
    assert f"program:</p>\n<pre>{call}</pre>" in next_step()
    model.mkdir()
    (model / "config.json").touch()
    command = f"keras-iris generate --preset {model} 'How are you?'"
    assert f"<pre>{command}</pre>" in next_step()


def test_unwritable_folder(run_dir):
    (run_dir / "report.html").mkdir()
    with pytest.raises(ValueError, match="Expected to write the report into"):
        report(run_dir)


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
