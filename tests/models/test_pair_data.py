"""`fit`, `evaluate` and `predict` of a `PairDataset`."""

import keras
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris import backend
from keras_iris.data import Example, PairDataset
from keras_iris.models.score import score_pairs

NUM_PAIRS = 11


def _responses(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(1, VOCABULARY_SIZE, length).astype("int32")
        for length in lengths
    ]


def _data(lengths=range(2, 2 + NUM_PAIRS), **options):
    """Pairs that are told apart by the lengths of annotated responses."""
    real, synthetic = _responses(lengths), _responses(lengths, seed=1)
    prompts = _responses([3] * len(real), seed=2)
    examples = [Example(p, r) for p, r in zip(prompts, real, strict=True)]
    rng = np.random.default_rng(3)
    log_probs = rng.normal(-20, 5, (len(real), 2))
    options = {"batch_size": 4, "bucket_lengths": [8, 16], **options}
    return (
        examples,
        synthetic,
        PairDataset(examples, synthetic, log_probs, **options),
    )


def _model(learning_rate=0.0, **options):
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(
        keras.optimizers.SGD(learning_rate),
        keras_iris.losses.IRIS(1.5),
        **options,
    )
    return model


class Seen(keras.callbacks.Callback):
    """Which examples the batches of an epoch had."""

    def __init__(self):
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append([])

    def on_train_batch_end(self, batch, logs=None):
        tokens = self.model.recent.latest().num_tokens[:, 0]
        self.epochs[-1].append((tokens - 2).astype(int).tolist())


def _order(dataset, epoch):
    dataset = dataset.at_epoch(epoch)
    batches = [dataset.indices(i) for i in range(len(dataset))]
    return [batch[batch >= 0].tolist() for batch in batches]


def test_validation_is_a_function_of_the_weights():
    model = _model()
    *_, data = _data()
    *_, validation = _data(seed=1)
    losses = model.fit(
        data, validation_data=validation, epochs=3, verbose=0
    ).history["val_loss"]
    assert losses == [losses[0]] * 3
    for _ in range(2):
        value = model.evaluate(validation, verbose=0)
        np.testing.assert_allclose(np.ravel(value)[0], losses[0], rtol=1e-6)
        assert validation.epoch == 0


def test_each_epoch_of_fit_has_its_own_order():
    model, seen = _model(), Seen()
    *_, data = _data(seed=5)
    expected = [_order(data, epoch) for epoch in range(4)]
    model.fit(data, epochs=3, shuffle=False, callbacks=[seen], verbose=0)
    assert seen.epochs == expected[:3]
    assert seen.epochs[0] != seen.epochs[1] != seen.epochs[2]
    # Taken up again, in another process perhaps: Keras' own count.
    *_, data = _data(seed=5)
    model.fit(data, initial_epoch=2, epochs=4, callbacks=seen, verbose=0)
    assert seen.epochs[3:] == expected[2:]


def test_a_callback_may_set_the_epoch():
    model, seen = _model(), Seen()
    *_, data = _data(seed=5)

    class Back(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            data.epoch = 9 - epoch

    for batches in (data, backend.dataset(data)):
        model.fit(
            batches,
            epochs=3,
            shuffle=False,
            callbacks=[Back(), seen],
            verbose=0,
        )
    assert seen.epochs == [_order(data, epoch) for epoch in (9, 8, 7)] * 2


def test_predict_gives_the_rows_in_the_order_of_the_examples():
    model = _model()
    examples, synthetic, data = _data()
    log_probs = model.predict(data, verbose=0)
    assert log_probs.shape == (NUM_PAIRS, 2)
    for row in (0, 3, 10):
        alone = PairDataset(
            examples[row : row + 1], synthetic[row : row + 1], batch_size=1
        )
        np.testing.assert_allclose(
            log_probs[row], model.predict(alone, verbose=0)[0], rtol=1e-4
        )
    scores = score_pairs(model, examples, synthetic, batch_size=3)
    np.testing.assert_allclose(scores, log_probs, rtol=1e-4)
    scores = score_pairs(model, examples, None, batch_size=3)
    np.testing.assert_allclose(scores, log_probs[:, :1], rtol=1e-4)
    with pytest.raises(ValueError, match="steps for 4 of 12 rows"):
        model.predict(data, steps=1, verbose=0)


def test_a_length_that_comes_late():
    """Keras reads TensorFlow's shapes from the first two batches."""
    *_, data = _data([2] * 8 + [13] * 4, shuffle=False)
    model = _model()
    assert model.predict(data, verbose=0).shape == (12, 2)
    model.evaluate(data, verbose=0)
    model.fit(data, verbose=0)
