"""The parts of benchmarks/headline_g2p.py against plain loops."""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the study is JAX's"
)


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def rows():
    import headline_data

    words = [("cab", ["K", "AE", "B"]), ("abbacabs", ["AE", "B", "K"])]
    return headline_data.encode([*words, ("baa", ["B", "AA"])] * 4)


@pytest.fixture
def params(rows):
    import headline_model
    import jax

    size = {"layers": 2, "width": 8, "inner_width": 8}
    params = headline_model.init(jax.random.key(0), rows[1], size)
    # So that it has opinions.
    return jax.tree.map(lambda p: 40 * p, params)


def test_rows(rows):
    (ids, number), letters = rows, 3 + np.array([2, 0, 1])  # c, a, b
    # AA, AE, B and K follow the letters.
    assert number == 3 + 26 + 4
    assert list(ids[0]) == [0] * 5 + [*letters, 2, 32, 30, 31, 1] + [0] * 5


def test_splits_share_no_word():
    import headline_data

    sizes = {"pool": 5, "validation": 2, "test": 3}
    found = headline_data.split(np.arange(23)[:, None], sizes, 2)
    assert [len(part) for part in found[1]] == [5, 2, 3]
    assert len(np.unique(np.concatenate([*found[0], *found[1]]))) == 20


def test_corrupt(rows):
    import headline_data

    ids = np.tile(rows[0], (200, 1))
    is_phoneme = ids >= 29
    wrong = headline_data.corrupt(ids, 0.3, seed=0) != ids
    assert not wrong[~is_phoneme].any()
    # A quarter of the replacements are the phoneme that was there.
    assert wrong[is_phoneme].mean() == pytest.approx(0.3 * 3 / 4, abs=0.02)
    assert (headline_data.corrupt(ids, 0.0, seed=0) == ids).all()


def test_edit_distances():
    import headline_data

    def distance(a, b):
        if not len(a) or not len(b):
            return len(a) + len(b)
        return min(
            distance(a[1:], b) + 1,
            distance(a, b[1:]) + 1,
            distance(a[1:], b[1:]) + (a[0] != b[0]),
        )

    generator = np.random.default_rng(0)
    left, right = generator.integers(1, 4, (2, 30, headline_data.RESPONSE))
    for each in (left, right):
        lengths = generator.integers(0, 6, 30)
        each[np.arange(each.shape[1]) >= lengths[:, None]] = headline_data.PAD
    expected = [
        distance(a[a > 0].tolist(), b[b > 0].tolist())
        for a, b in zip(left, right, strict=True)
    ]
    assert headline_data.edit_distances(left, right).tolist() == expected


def test_greedy_answers_are_those_of_the_forward_pass(rows, params):
    """A cache or not: at each place the likeliest symbol."""
    import headline_model
    import jax

    answers = headline_model.generate(params, rows[0], jax.random.key(0), True)
    answer = np.asarray(answers)[0]
    assert (answer[:9] == rows[0][0, :9]).all()
    length = np.count_nonzero(answer[9:])
    assert length > 1
    for position in range(9, 9 + length):
        stems = np.tile(answer, (rows[1] - 1, 1))
        stems[:, position] = np.arange(1, rows[1])
        stems[:, position + 1 :] = 0
        best = np.argmax(headline_model.log_probs(params, stems))
        assert best + 1 == answer[position]


def test_samples_have_the_frequencies_of_their_log_probs(rows, params):
    import headline_model
    import jax

    ids = np.repeat(rows[0][:1], 4_000, axis=0)
    answers = np.asarray(
        headline_model.generate(params, ids, jax.random.key(1))
    )
    firsts = np.unique(answers[:, 9])
    stems = np.repeat(ids[:1], len(firsts), axis=0)
    stems[:, 9], stems[:, 10:] = firsts, 0
    expected = np.exp(headline_model.log_probs(params, stems))
    share = np.mean(answers[:, 9] == firsts[:, None], axis=1)
    assert share == pytest.approx(expected, abs=0.03)
    # Nothing follows an end.
    after_end = np.cumsum(answers[:, 9:] == 1, axis=1)[:, :-1] > 0
    assert (answers[:, 10:][after_end] == 0).all()


def test_pairs():
    import headline_training

    values = np.arange(5)[:, None] * 10 + np.arange(3)  # one, two kinds of two
    pairs = headline_training.as_pairs(values, 2, 2)
    assert pairs[:, 0].tolist() == [0, 1, 2] * 2
    assert pairs[:, 1].tolist() == [10, 11, 12, 20, 21, 22]
    assert pairs[:, 2].tolist() == [30, 31, 32, 40, 41, 42]
    alone = headline_training.as_pairs(values[:1], 0, 1)
    assert alone.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_sft_goes_on_as_it_began(rows, params):
    """The control is SFT: the same batches, steps and rates, to the bit."""
    import headline_plan
    import headline_training
    import jax

    method = headline_plan.METHODS[headline_plan.CONTROL]
    settings = {"rate": 1e-2, "batch_size": 4}
    key = jax.random.key(3)
    control, _ = headline_training.self_play(
        params, rows[0], key, method, settings | {"iterations": 2, "epochs": 1}
    )
    tuned = headline_training.fine_tune(
        params,
        rows[0],
        jax.random.split(key)[0],
        method,
        settings | {"epochs": 2},
    )
    for left, right in zip(
        *map(jax.tree.leaves, (control, tuned)), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_rates_and_differences():
    import headline_statistics

    nan = float("nan")
    tuning = [
        {"rate": 1, "nll": 2.0, "per greedy": nan},
        {"rate": 2, "nll": nan, "per greedy": 0.5},
        {"rate": 3, "nll": 1.0, "per greedy": 0.6},
    ]
    assert headline_statistics.choose_rates(tuning) == {
        "nll": 3,
        "per greedy": 2,
    }
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees 4.3027.
    found = headline_statistics.difference([2, 4, 6], [1, 2, 3])
    assert found == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert not found.excludes_zero
    assert headline_statistics.difference([2, 3], [1, 2.1]).excludes_zero


def test_runs_are_kept(tmp_path, monkeypatch):
    """A run of a file isn't made again, and one of other sizes is."""
    import headline_g2p
    import headline_runs

    settings = headline_g2p.SETTINGS | headline_g2p.QUICK
    file = tmp_path / "runs.jsonl"
    runs = headline_runs.Runs(file, settings)
    method = "IRIS adaptive, 4 answers"
    first = runs.get("main", method, 1e-3, 1)
    assert len(first["iterations"]) == settings["iterations"]
    assert all(0.5 <= each["order"] <= 3 for each in first["iterations"])
    monkeypatch.delattr(headline_runs.headline_training, "self_play")
    again = headline_runs.Runs(file, settings).get("main", method, 1e-3, 1)
    assert again == json.loads(json.dumps(first))
    other = headline_runs.Runs(file, settings | {"epochs": 1})
    with pytest.raises(AttributeError, match="self_play"):
        other.get("main", method, 1e-3, 1)


def test_record_is_of_the_plan():
    import headline_plan
    import records

    record = json.loads((records.RESULTS / "headline_g2p.json").read_text())
    settings = dict(record["settings"])
    grid = settings.pop("grid")
    assert settings == headline_plan.SETTINGS
    for name, (changes, methods) in headline_plan.GRID.items():
        assert grid[name] == changes
        shown = {r["method"] for r in record["rows"] if r["setting"] == name}
        assert shown >= set(methods)
