import pytest

from keras_iris.evaluation import read_metrics, report, scores_table
from keras_iris.evaluation.run_record import read_run


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
        run = read_run(run_dir)
    assert [other.name for other in run.others] == ["control"]


def test_home_folder(run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert len(read_metrics("~/run")) == len(read_metrics(run_dir))
    assert scores_table("~/run") == scores_table(run_dir)
    assert report("~/run") == run_dir / "report.html"
