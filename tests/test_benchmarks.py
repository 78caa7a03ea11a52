"""The harness of the benchmarks, their records and the documents' tables."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def record(monkeypatch, tmp_path, capsys):
    """A function that writes a record of two contestants and one bar."""
    import records

    def write(name="train_step", quick=False, value=1.25):
        command = [f"{name}.py", "--output", str(tmp_path), "--backend", "jax"]
        monkeypatch.setattr(sys, "argv", command)
        rows = [
            {
                "contestant": contestant,
                "tokens/s": 1234.5678,
                "x plain loop": 1.0,
                "x TRL": 2.0,
                "peak MB": 3000.123,
            }
            for contestant in ("keras_iris, jax", "theirs")
        ]
        del rows[1]["x TRL"]
        records.finish(
            f"somewhere/{name}.py",
            types.SimpleNamespace(quick=quick, output=tmp_path),
            settings={"rounds": 1},
            rows=rows,
            bars=[records.bar("time over theirs", value, at_most=1.1)],
        )
        return capsys.readouterr().out

    return write


def test_record(record, tmp_path):
    printed = record()
    content = json.loads((tmp_path / "train_step.json").read_text())
    assert content["command"] == (
        "python benchmarks/train_step.py --backend jax"
    )
    assert content["rows"][0]["tokens/s"] == 1235.0
    assert content["machine"]["cores"] >= 1
    assert content["versions"]["keras"]
    assert not content["bars"][0]["met"]
    assert "missed  time over theirs: 1.25 (at most 1.1)" in printed
    assert "theirs" in printed
    # Neither a host's name nor a path.
    assert str(tmp_path) not in json.dumps(content)


def test_quick_record_replaces_nothing(record, tmp_path):
    record()
    record(quick=True, value=1.0)
    content = json.loads((tmp_path / "train_step.json").read_text())
    assert content["bars"][0]["value"] == 1.25


@pytest.mark.parametrize(
    "value, limits, is_met",
    [
        (1.0, {"at_most": 1.0}, True),
        (1.001, {"at_most": 1.0}, False),
        (1.0, {"at_least": 1.0}, True),
        (0.999, {"at_least": 1.0}, False),
        (float("nan"), {"at_most": 1.0}, False),
    ],
)
def test_bar(value, limits, is_met):
    import records

    assert records.bar("figure", value, **limits)["met"] == is_met


def test_table(record, tmp_path):
    import table

    (tmp_path / "docs").mkdir()
    files = [tmp_path / "docs/benchmarks.md", tmp_path / "README.md"]
    for file in files:
        file.write_text(
            "Before\n\n<!-- benchmarks -->\n"
            "old\n<!-- /benchmarks -->\n\nAfter\n"
        )
    options = ["--results", str(tmp_path), "--root", str(tmp_path)]
    record()
    record("startup", value=0.1)
    assert table.main([*options, "--check"]) == 1
    assert table.main(options) == 0
    for file in files:
        text = file.read_text()
        assert text.startswith("Before") and text.endswith("After\n")
        assert "old" not in text
    text = files[0].read_text()
    assert "| keras_iris, jax | 1,235 | 1 | 2 | 3,000 |" in text
    assert "| theirs | 1,235 | 1 |  | 3,000 |" in text
    assert (
        "| `train_step` | time over theirs | at most 1.1 | 1.25 | missed |"
    ) in text
    assert (
        "| `startup` | time over theirs | at most 1.1 | 0.1 | met |"
    ) in text
    assert table.main([*options, "--check"]) == 0
    # Another figure.
    record(value=1.0)
    assert table.main([*options, "--check"]) == 1
    assert table.main(options) == 0
    # A document of the two that differs.
    files[1].write_text(files[1].read_text().replace("| 2 |", "| 3 |"))
    assert table.main([*options, "--check"]) == 1


def test_figures():
    import table

    machines = table.read_records(table.records.RESULTS)
    lines = table.make_figures(machines).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0][1:4] == ["JAX", "TensorFlow", "PyTorch"]
    found = {name: record for each in machines for name, record in each.items()}

    def value(name, column, **where):
        (row,) = [
            row for row in found[name]["rows"] if where.items() <= row.items()
        ]
        return f"{row[column]:.3g}"

    jax, torch = "keras_iris, jax", "keras_iris, torch"
    step, gpu = "train_step", "train_step_gpu"
    assert [row[1] for row in cells[2:]] == [
        value(step, "x TRL", contestant=jax),
        value(step, "x plain loop", contestant=jax),
        value("generation", "x transformers", contestant=jax),
        value("log_probs", "memory ratio", size="large", backend="jax"),
        value(gpu, "x TRL", contestant=jax),
    ]
    # TensorFlow has no record on a GPU.
    assert cells[-1][2:4] == ["", value(gpu, "x TRL", contestant=torch)]
    assert "2 cores" in cells[2][4] and "H100" in cells[-1][4]
    assert cells[2][5] == "`python benchmarks/train_step.py`"


def test_table_without_records(tmp_path, record):
    import table

    record(quick=True)
    with pytest.raises(ValueError, match="no record of a benchmark"):
        table.read_records(tmp_path)


def test_table_of_two_machines(tmp_path, record):
    import table

    record()
    record("startup")
    file = tmp_path / "startup.json"
    content = json.loads(file.read_text())
    content["machine"]["cores"] = 3
    file.write_text(json.dumps(content))
    found = table.read_records(tmp_path)
    assert [list(records) for records in found] == [["startup"], ["train_step"]]
    assert "3 cores" in table.make_block(found[0])


def test_table_of_an_unknown_column(monkeypatch, tmp_path, record):
    import table

    record()
    (found,) = table.read_records(tmp_path)
    monkeypatch.setitem(table.COLUMNS, "train_step", ("contestant", "x TLR"))
    with pytest.raises(ValueError, match=r"has no \['x TLR'\], expected"):
        table.make_block(found)


def test_each_evidence_has_a_place_of_its_own():
    import table

    text = "<!-- a --><!-- /a -->\n<!-- b -->old<!-- /b -->\n"
    assert table.insert(text, "new", "b") == (
        "<!-- a --><!-- /a -->\n<!-- b -->\n\nnew\n\n<!-- /b -->\n"
    )


def test_document_without_marks():
    import table

    with pytest.raises(ValueError, match="no place for the figures"):
        table.insert("# A document", "figures")


def test_records_are_of_the_settings_of_the_scripts():
    import generation
    import log_probs
    import micro_batch
    import records
    import remat
    import scaling
    import smollm2_study
    import table
    import tabular_problem
    import train_step

    settings = {
        name: record["settings"]
        for found in table.read_records(records.RESULTS)
        for name, record in found.items()
    }
    assert settings["generation"]["model"] == generation.SETTINGS["model"]
    assert settings["log_probs"].items() >= log_probs.SIZES.items()
    assert settings["micro_batch"]["model"] == micro_batch.MODEL
    assert settings["remat"]["model"] == remat.MODEL
    assert settings["scaling"]["base"] == scaling.BASE
    for name, expected in train_step.MODELS.values():
        races = {"races": train_step.RACES[name]}
        assert settings[name].items() >= (expected | races).items()
    assert settings["log_probs_gpu"].items() >= log_probs.SIZES.items()
    assert settings["tabular"] == tabular_problem.SETTINGS
    assert settings["smollm2_study"].items() >= smollm2_study.SMALL.items()


def test_tabular_is_exact():
    import records

    record = json.loads((records.RESULTS / "tabular.json").read_text())
    assert len(record["bars"]) == 6
    assert all(bar["met"] for bar in record["bars"])


def test_scores_of_answers():
    import smollm2_scores

    answers = [[1, 2, 1, 2, 1, 2], [3, 1, 2], [3]]
    scores = smollm2_scores.score_texts(answers)
    assert scores["length"] == pytest.approx(10 / 3)
    # Of 121 212 121 212 and 312.
    assert scores["repeated_3"] == pytest.approx(2 / 5)
    # 1, 2, 3 of ten; 12, 21, 31 of seven.
    assert scores["distinct_1"] == pytest.approx(3 / 10)
    assert scores["distinct_2"] == pytest.approx(3 / 7)
    ones = [6 / 4, 1 / 2 + 2 / 4, 1 / 2]
    assert scores["distinct_1"].values == pytest.approx(ones)


def test_what_a_classifier_tells_apart():
    import smollm2_scores

    lower = [f"yeah number {i} sounds nice" for i in range(12)]
    upper = [text.upper() for text in lower]

    def accuracy(annotated, drawn):
        return smollm2_scores.told_apart(annotated, drawn, folds=4)

    assert accuracy(lower, upper) == 1
    # One and the same text can't be both.
    assert (accuracy(lower, lower).values == 1).all()
    # Half of the drawn ones are annotated ones, word for word.
    mixed = accuracy(lower, lower[:6] + upper[6:])
    assert 0.5 < mixed < 1 and (mixed.values[6:] == 2).all()


def test_study_has_one_turn_of_a_conversation(tmp_path, monkeypatch):
    import smollm2_scores

    messages = [{"text": "one two"}, {"text": "three"}]
    turns = [messages, [{"text": "Four five six seven eight"}]]
    chats = {
        "long": {"messages": turns * 3},
        "short": {"messages": [turns[1], [{"text": "nine ten"}]]},
    }
    package = tmp_path / "chitchat_dataset"
    package.mkdir()
    (package / "dataset.json").write_text(json.dumps(chats))
    monkeypatch.setattr("importlib.resources.files", tmp_path.joinpath)
    (row,) = smollm2_scores.load_rows()
    assert row == {
        "prompt": "one two three",
        "response": "Four five six seven eight",
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* conversations were dropped")
def test_study_runs(checkpoint, tmp_path, monkeypatch, capsys):
    import smollm2_study

    options = [f"--{name}={tmp_path / name}" for name in ("runs", "output")]
    options += ["--quick", f"--preset={checkpoint('qwen2')}"]
    monkeypatch.setattr(sys, "argv", ["smollm2_study.py", *options])
    smollm2_study.main()
    printed = capsys.readouterr().out
    assert "IRIS - SFT" in printed and "met     steps apart" in printed
    # The second time nothing is trained.
    file = tmp_path / "output/smollm2_study.quick.json"
    first = json.loads(file.read_text())
    smollm2_study.main()
    again = json.loads(file.read_text())
    assert again["figures"] == first["figures"]
    assert again["seconds"] == first["seconds"]
    nll = [
        each["value"]
        for each in first["figures"]
        if (each["arm"], each["score"]) == ("start", "nll_per_token")
    ]
    assert nll[0] == pytest.approx(np.log(640), rel=0.05)


def test_step_flops():
    import models

    sizes = {
        "vocabulary": 11,
        "layers": 3,
        "width": 8,
        "heads": 4,
        "key_value_heads": 2,
        "inner_width": 5,
    }
    batch = {"pairs": 2, "length": 7, "prompt_length": 4}
    # Multiplications of the forward pass for a token of a layer: queries and
    # outputs, keys and values, the feedforward's three; scores and averages
    # over the positions before it, half of them.
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 5 + 2 * 8 * 7 / 2
    head = 8 * 11
    expected = 4 * 7 * 3 * layer + 4 * 3 * head
    # An addition for each, and twice as much backward.
    assert models.step_flops(sizes, batch) == 6 * expected


def test_a_gpu_that_is_missing(monkeypatch):
    import records

    monkeypatch.setenv("PATH", "")
    records.check_device("cpu")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        records.check_device("gpu")


def test_worker(tmp_path, monkeypatch):
    import harness

    # What a library prints must not be taken for the answer.
    (tmp_path / "echo.py").write_text(
        "import os\n"
        "class Echo:\n"
        "    def __init__(self, first):\n"
        "        print('noise')\n"
        "        self.first = first\n"
        "    def add(self, number):\n"
        "        os.write(1, b'noise\\n')\n"
        "        return [self.first + number, os.environ['KERAS_BACKEND']]\n"
        "    def fail(self):\n"
        "        raise RuntimeError('the reason')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with harness.Worker("x/echo.py", "Echo", backend="jax", first=1) as worker:
        assert worker.call("add", number=2) == [3, "jax"]
        with pytest.raises(RuntimeError, match="the reason"):
            worker.call("fail")


def test_memory_above():
    import harness

    # 64 MB, written to.
    memory_mb, total = harness.memory_above(
        lambda: float(np.ones(8_000_000).sum())
    )
    assert total == 8_000_000
    assert 60 < memory_mb < 100


def test_nobody_runs_while_others_start():
    import harness

    made = []

    class Worker:
        def wait(self):
            made.append("wait")

        def call(self, method):
            made.append(method)

    for run in harness.runs({"a": Worker(), "b": Worker()}).values():
        run()
    assert made == ["wait", "wait", "run", "run"]


def test_of_each_turn_the_second_call_counts():
    import harness

    made = []
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    assert harness.take_turns(calls, 2) == {"a": [None] * 2, "b": [None] * 2}
    assert "".join(made) == "aabbbbaa"
    counts = {"a": iter(range(4)).__next__}
    assert harness.take_turns(counts, 2) == {"a": [1, 3]}


def test_median_ratio_is_taken_round_by_round():
    import harness

    # A busy third round, ten times slower for both.
    assert harness.median_ratio([2, 2, 20], [1, 1, 10]) == 2


def test_scaling_finds_exponents_and_terms():
    import scaling

    sizes = scaling.list_sizes(scaling.BASE, scaling.FACTORS)
    assert len(sizes) == 1 + 4 * 2
    # All of it the layers' matrices: proportional to tokens and layers.
    seconds = [
        1e-6 * s["batch"] * s["length"] * s["layers"] for _, _, s in sizes
    ]
    slopes = scaling.exponents(sizes, seconds)
    expected = {"batch": 1, "length": 1, "vocabulary": 0, "layers": 1}
    assert slopes == pytest.approx(expected, abs=1e-9)
    shares, error = scaling.shares(sizes, seconds)
    assert shares[0]["layers"] == pytest.approx(1)
    assert error < 1e-9


def test_documents_show_the_results():
    import table

    assert table.main(["--check"]) == 0
