"""Loggers that people use show what a run is judged by."""

import csv

import keras
from self_play_helpers import lines_of, make_self_play
from tensorboard.backend.event_processing import event_accumulator

import keras_iris
from keras_iris.callbacks import AlphaScheduler

NAMES = {m.name for m in keras_iris.metrics.self_play_metrics()} | {"loss"}


def test_loggers_of_keras(tmp_path):
    callbacks = [
        AlphaScheduler(),
        keras.callbacks.TensorBoard(tmp_path / "board", update_freq=1),
        keras.callbacks.CSVLogger(tmp_path / "epochs.csv", append=True),
    ]
    make_self_play(tmp_path / "run", callbacks=callbacks).run()
    events = event_accumulator.EventAccumulator(str(tmp_path / "board/train"))
    tags = set(events.Reload().Tags()["tensors"])
    assert {f"{kind}_{n}" for kind in ("batch", "epoch") for n in NAMES} <= tags
    epochs = [event.step for event in events.Tensors("epoch_alpha")]
    assert epochs == [0, 1, 2, 3]  # over both iterations
    assert len(lines_of(tmp_path / "run", "step")) == 12
    with open(tmp_path / "epochs.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == epochs
    assert set(rows[0]) >= NAMES
