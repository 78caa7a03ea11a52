"""Which responses counted most, in the report."""

import json

import numpy as np
import oracles
import pytest

from keras_iris.data import Example, PairDataset, SymbolTokenizer
from keras_iris.evaluation import report
from keras_iris.metrics import PairBatch
from keras_iris.self_play.weighted_rows import WeightedRows

pytestmark = pytest.mark.once

TOKENIZER = SymbolTokenizer(list("abcdefghij"))


def _dataset(number, num_samples=1):
    ids = [np.array([i], "int32") for i in range(2, 12)]
    examples = [Example(ids[0], ids[i]) for i in range(number)]
    synthetic = [
        np.concatenate([ids[i // num_samples], ids[i % num_samples]])
        for i in range(number * num_samples)
    ]
    return PairDataset(
        examples, synthetic, batch_size=num_samples, num_samples=num_samples
    )


def _batch(rng, number, alpha):
    opponent = rng.normal(size=(number, 2))
    ratio = rng.normal(size=(number, 2))
    weight = rng.uniform(0.5, 2, number)
    tokens = np.ones((number, 2))
    return PairBatch(opponent, opponent + ratio, tokens, weight, alpha)


def test_largest_and_smallest_of_all_batches():
    rng = np.random.default_rng(0)
    rows = WeightedRows(number=2)
    expected = {"annotated": {}, "synthetic": {}}
    order = rng.permutation(20)
    for part in np.split(order, 4):
        batch = _batch(rng, 5, alpha=2.0)
        rows.add(part, batch)
        real, synthetic = batch.log_ratio.T
        for name, values, tilt in (
            ("annotated", -real, -1.0),
            ("synthetic", synthetic, 2.0),
        ):
            weight = batch.sample_weight
            weights = oracles.tilted_weights(values, tilt, weight)
            share = weight / weight.sum()
            expected[name].update(zip(part, weights / share, strict=True))
    lines = rows.lines(_dataset(10, num_samples=2), TOKENIZER)
    for name, weights in expected.items():
        found = [line for line in lines if line["column"] == name]
        ranked = sorted(weights, key=weights.get, reverse=True)
        ranked = ranked[:2] + ranked[-2:]
        assert [line["weight"] for line in found] == pytest.approx(
            [weights[i] for i in ranked], rel=1e-4
        )
        for line, pair in zip(found, ranked, strict=True):
            first, second = (TOKENIZER.decode([2 + i]) for i in divmod(pair, 2))
            text = first if name == "annotated" else f"{first} {second}"
            assert line["response"] == text
            assert line["prompt"] == TOKENIZER.decode([2])


def test_at_order_one_annotated_responses_count_alike():
    rows = WeightedRows()
    rows.add(np.arange(5), _batch(np.random.default_rng(0), 5, alpha=1.0))
    lines = rows.lines(_dataset(5), TOKENIZER)
    assert {line["column"] for line in lines} == {"synthetic"}


def test_the_report_shows_those_of_the_last_iteration(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with open(tmp_path / "weights.jsonl", "w") as file:
        for iteration in (1, 2):
            line = {
                "iteration": iteration,
                "number": 0,
                "column": "synthetic",
                "weight": 3.25,
                "prompt": "<b>",
                "response": f"of {iteration}",
            }
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({**line, "weight": "much"}) + "\n")
    page = report(tmp_path).read_text()
    lines = {"weight": "3.25", "prompt": "&lt;b&gt;", "synthetic": "of 2"}
    shown = "\n".join(
        f"<tr><td>{name}</td><td>{text}</td></tr>"
        for name, text in lines.items()
    )
    assert shown in page
    assert "of 1" not in page
