"""Each sign of a training that goes wrong is told of once."""

import warnings

import pytest

from keras_iris.evaluation import report, scores_table
from keras_iris.self_play.alarms import WINDOW, Alarms, alarm_texts

pytestmark = pytest.mark.once

GOOD = {
    "real_log_ratio": 0.5,
    "margin_accuracy": 0.9,
    "real_ess": 0.5,
    "synthetic_ess": 0.5,
    "gradient_norm": 1.0,
}


class Log(list):
    def __call__(self, kind, **values):
        self.append({"kind": kind, **values})


def _watch(alarms, values, first=1, iteration=1):
    for step in range(first, first + len(values)):
        alarms.watch(iteration, step, GOOD | values[step - first])


def test_values_of_a_good_run_raise_none():
    log = Log()
    alarms = Alarms(log)
    alarms.begin(1, 0, (100, 150))
    _watch(alarms, [{}] * 3 * WINDOW)
    assert log == []


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("real_log_ratio", -1.2, "mean log-ratio is -1.20 nats"),
        ("margin_accuracy", 0.995, "in 99.5% of pairs"),
        ("real_ess", 0.04, "Few annotated .* 4.0% of a batch"),
        ("synthetic_ess", 0.04, "Few synthetic .* 4.0% of a batch"),
    ],
)
def test_means_over_steps(name, bad, words):
    log = Log()
    alarms = Alarms(log)
    alarms.begin(1, 0, (100, 100))
    _watch(alarms, [{name: bad}] * (WINDOW - 1))
    assert log == []  # not yet
    with pytest.warns(UserWarning, match=words):
        _watch(alarms, [{name: bad}], first=WINDOW)
    place = {"kind": "alarm", "iteration": 1, "step": WINDOW}
    assert log == [{**place, name: pytest.approx(bad)}]
    # Not again: neither in the next iteration, nor where the run goes on.
    for same in (alarms, Alarms(log, list(log))):
        same.begin(2, 100, (100, 100))
        _watch(same, [{name: bad}] * 2 * WINDOW, iteration=2)
    assert len(log) == 1
    (text,) = alarm_texts(log)
    assert text.startswith(f"Step {WINDOW}: ")


def test_log_ratios_of_an_iteration_before_do_not_count():
    alarms = Alarms(log := Log())
    for iteration in (1, 2):
        alarms.begin(iteration, 0, (100, 100))
        _watch(alarms, [{"real_log_ratio": -5.0}] * (WINDOW - 1))
    assert log == []


def test_gradient_that_grows():
    alarms = Alarms(log := Log())
    alarms.begin(1, 0, (100, 100))
    _watch(alarms, [{"gradient_norm": 2.0}] * WINDOW)
    _watch(alarms, [{"gradient_norm": 20.0}])  # ten times, not over it
    with pytest.warns(UserWarning, match="norm of the gradient is 20.1"):
        _watch(alarms, [{"gradient_norm": 20.1}])
    assert log[0]["gradient_norm"] == 20.1


@pytest.mark.parametrize(("number", "is_alarm"), [(49, 1), (50, 0), (201, 1)])
def test_lengths_that_drift(number, is_alarm):
    alarms = Alarms(log := Log())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        alarms.begin(3, 60, (100, number))
        alarms.begin(4, 80, (100, number))
    assert len(log) == len(seen) == is_alarm


def test_the_report_shows_them(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "alarm", "iteration": 2, "step": 40, "length_ratio": 2.5}\n'
    )
    words = "Step 40: Synthetic responses have 2.50 times the tokens"
    assert words in scores_table(tmp_path)
    page = report(tmp_path).read_text()
    assert words in page[page.index(">Alarms</h2>") :]
