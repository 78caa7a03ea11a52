"""The README's program runs as it stands."""

import re
from pathlib import Path

import numpy as np
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.data import Example, PairDataset

README = Path(__file__).parents[1] / "README.md"


def test_three_lines(capsys):
    program = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    assert "SelfPlayModel" in program
    rows = make_pairs(batch_size=6)["token_ids"]
    pairs = PairDataset(
        [Example(row[:4], row[4:]) for row in rows[:, 0]],
        list(rows[:, 1, 4:]),
        np.full((6, 2), -40.0),
        batch_size=6,
    )
    names = {
        "keras_iris": keras_iris,
        "causal_lm": make_causal_lm(),
        "pairs": pairs,
    }
    exec(program, names)
    assert names["model"].optimizer.iterations == 1
    assert np.isfinite(names["model"].history.history["loss"]).all()
