import functools

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.callbacks import AlphaSchedule, AlphaScheduler, RenyiGap
from keras_iris.callbacks.gap import gap_of_moments
from keras_iris.data import Example, PairDataset
from keras_iris.losses import IRIS, SPIN
from keras_iris.metrics import PairBatch, effective_sample_size


def _new_model():
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(optimizer=keras.optimizers.SGD(0.02), loss=IRIS(2.0))
    model.optimizer.build(model.trainable_variables)
    return model


@functools.cache
def _kept_model():
    model = _new_model()
    variables = model.variables + model.optimizer.variables
    return model, [(v, keras.ops.convert_to_numpy(v)) for v in variables]


def _model():
    """As a new one, but its step is traced once for all tests."""
    model, values = _kept_model()
    for variable, value in values:
        variable.assign(value)
    keras.utils.set_random_seed(0)
    return model


def _batch(policy, opponent=None):
    policy = np.asarray(policy, "float64")
    shape = policy.shape
    return PairBatch(
        np.zeros(shape) if opponent is None else np.asarray(opponent),
        policy,
        np.ones(shape),
        np.ones(shape[0]),
    )


class _Alphas(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values, self.gaps = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(self.model.alpha.value))
        self.gaps.append(float(self.model.gap.value))


class _Gaps:
    """Gaps that somebody else has estimated."""

    def __init__(self, *values):
        self.values = list(values)

    def gap(self, pairs):
        return self.values.pop(0)


def _pairs_and_opponent(num_pairs=32):
    pairs = make_pairs(batch_size=num_pairs)
    # Two kinds of responses, so that there is a gap.
    rng = np.random.default_rng(0)
    num_tokens = pairs["response_mask"].sum(axis=2)
    opponent = (rng.normal(size=(num_pairs, 2)) - [4, 3]) * num_tokens
    return pairs, opponent.astype("float32"), num_tokens


@pytest.mark.parametrize(
    ("gap", "coefficient", "order"),
    [
        (0.0, 0.5, 1.0),
        (0.44, 0.5, 1.22),
        (3.2, 0.5, 2.6),
        (3.2, 0.1, 1.32),
        (9.0, 0.5, 3.0),
        (-3.0, 0.5, 0.5),  # of somebody else's estimate
    ],
)
def test_rule_of_the_paper(gap, coefficient, order):
    """alpha = clip(1 + coefficient * gap, 0.5, 3): its equation 9."""
    model = _model()
    scheduler = AlphaScheduler(coefficient, gap=_Gaps(gap))
    scheduler.set_model(model)
    scheduler.on_iteration_begin(1)
    scheduler.on_score_end(1, _batch(np.zeros((4, 2))))
    assert float(model.alpha.value) == pytest.approx(order)
    assert float(model.gap.value) == pytest.approx(gap)


def test_guard_keeps_half_of_both_weights():
    scheduler = AlphaScheduler()
    rng = np.random.default_rng(0)
    batch = _batch(rng.normal(scale=1.2, size=(64, 2)))
    alpha = scheduler._capped(2.0, batch)
    real, synthetic = batch.log_ratio.T

    def smaller(order):
        return min(
            float(effective_sample_size(real, order - 1)),
            float(effective_sample_size(synthetic, order)),
        )

    assert 0 < alpha < 2
    assert smaller(alpha) >= 0.5
    assert smaller(alpha + 0.05) < 0.5


def test_guard_binds_at_long_responses():
    """At nats a token alike, a long response's log-ratio is larger."""
    scheduler = AlphaScheduler()
    rng = np.random.default_rng(0)
    per_token = rng.normal(scale=0.1, size=(64, 2))
    orders = [
        scheduler._capped(1.5, _batch(length**0.5 * per_token))
        for length in (4, 64, 1024)
    ]
    assert orders[0] == 1.5
    assert 1.5 > orders[1] > orders[2]


def test_guard_takes_the_best_where_no_order_keeps_enough():
    scheduler = AlphaScheduler()
    rng = np.random.default_rng(0)
    alpha = scheduler._capped(2.0, _batch(rng.normal(scale=20, size=(64, 2))))
    assert 0.3 < alpha < 0.7  # both tilts matter alike at 1/2


@pytest.mark.parametrize("scale", [5, 20, 40, 80, 500])
def test_guard_where_every_order_leaves_one_pair(scale):
    """Whatever that is exactly the same for, it isn't the largest order."""
    log_ratio = scale * np.array([[1, 1], [0, 0], [-1, -1]], "float32")
    assert 0.45 < AlphaScheduler()._capped(3.0, _batch(log_ratio)) < 0.55


def test_guard_is_off_at_zero():
    scheduler = AlphaScheduler(min_effective_sample_size=0.0)
    batch = _batch(np.random.default_rng(0).normal(scale=20, size=(64, 2)))
    assert scheduler._capped(2.0, batch) == 2.0


def test_it_sets_alpha_within_an_epoch_without_compiling_again():
    model = _new_model()
    pairs, opponent, _ = _pairs_and_opponent()
    alphas = _Alphas()
    num_traces = 0
    call = model.call

    def counted(*args, **kwargs):
        nonlocal num_traces
        num_traces += 1
        return call(*args, **kwargs)

    model.call = counted

    def fit():
        scheduler = AlphaScheduler(
            gap=_Gaps(0.8, 0.4, 0.0, 0.8), min_effective_sample_size=0.0
        )
        model.fit(
            pairs,
            opponent,
            batch_size=8,
            verbose=0,
            callbacks=[scheduler, alphas],
        )

    fit()
    traced = num_traces
    fit()
    means = [0.8, 0.6, 0.4, 0.5]  # of the batches so far
    np.testing.assert_allclose(alphas.gaps, 2 * means, rtol=1e-5)
    expected = 2 * [1.4, 1.3, 1.2, 1.25]
    np.testing.assert_allclose(alphas.values, expected, rtol=1e-5)
    if keras.backend.backend() != "torch":  # which traces nothing
        assert num_traces == traced


def test_the_gap_is_streamed_over_the_first_epoch_and_then_final():
    model = _model()
    pairs, opponent, num_tokens = _pairs_and_opponent()
    alphas = _Alphas()
    model.fit(
        pairs,
        opponent,
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[AlphaScheduler(), alphas],
    )
    tokens = num_tokens.astype("float64")
    gaps = [
        RenyiGap().gap(
            PairBatch(opponent[:n], opponent[:n], tokens[:n], np.ones(n))
        )
        for n in (8, 16, 24, 32)
    ]
    assert min(gaps) > 0.1
    np.testing.assert_allclose(alphas.gaps[:4], gaps, rtol=1e-4)
    np.testing.assert_allclose(alphas.gaps[4:], gaps[-1:] * 8, rtol=1e-4)
    sums = keras.ops.convert_to_numpy(model.gap_sums.value)
    assert sums[:, 0].tolist() == [32, 32]
    assert gap_of_moments(sums) == pytest.approx(gaps[-1], rel=1e-4)


def test_the_gap_of_pairs_that_share_an_annotated_response():
    response = np.ones(2, "int32")
    pairs = PairDataset(
        [Example(response, response)] * 6,
        [response] * 12,
        np.random.default_rng(0).normal(-8, 2, (12, 2)),
        batch_size=6,
        num_samples=2,
    )
    model = _model()
    model.fit(pairs, verbose=0, callbacks=[AlphaScheduler()])
    sums = keras.ops.convert_to_numpy(model.gap_sums.value)
    assert sums[:, 0].tolist() == [6, 12]


def test_a_resumed_fit_has_the_alpha_of_an_unbroken_one(tmp_path):
    pairs, opponent, _ = _pairs_and_opponent()

    def fit(model, first, end):
        alphas = _Alphas()
        model.fit(
            pairs,
            opponent,
            batch_size=8,
            initial_epoch=first,
            epochs=end,
            shuffle=False,
            verbose=0,
            callbacks=[AlphaScheduler(), alphas],
        )
        return alphas.values

    whole = fit(_model(), 0, 2)
    model = _model()
    fit(model, 0, 1)
    model.save_weights(tmp_path / "m.weights.h5")
    other = _new_model()
    other.load_weights(tmp_path / "m.weights.h5")
    for name in ("gap_sums", "gap", "alpha"):
        left, right = (
            keras.ops.convert_to_numpy(getattr(m, name).value)
            for m in (model, other)
        )
        np.testing.assert_array_equal(left, right)
    assert fit(other, 1, 2) == whole[4:]


def test_a_new_fit_starts_with_a_new_gap():
    model = _model()
    pairs, opponent, _ = _pairs_and_opponent()
    scheduler = AlphaScheduler()
    first_orders = []
    order = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: first_orders.append(
            float(model.alpha.value)
        )
    )
    for log_probs in (opponent, opponent[:, :1].repeat(2, axis=1)):
        model.fit(
            pairs,
            log_probs,
            batch_size=8,
            verbose=0,
            callbacks=[scheduler, order],
        )
    # The second opponent finds both responses alike.
    assert float(model.gap.value) < 0.05
    assert first_orders[0] == first_orders[4] == 2.0  # that of the loss


def test_evaluating_within_an_epoch_changes_no_order():
    pairs, opponent, _ = _pairs_and_opponent()

    class Evaluate(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.evaluate(pairs, -opponent, batch_size=16, verbose=0)

    def fit(*before, **options):
        alphas = _Alphas()
        _model().fit(
            pairs,
            opponent,
            batch_size=8,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[*before, AlphaScheduler(), alphas],
            **options,
        )
        return alphas.values, alphas.gaps

    validated = {"validation_data": (pairs, -opponent)}
    assert fit() == fit(Evaluate(), **validated)


def test_more_pairs_than_are_kept():
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile("sgd", IRIS(), micro_batch_size=513)
    with pytest.raises(ValueError, match="4096 pairs are kept"):
        model.fit(
            make_pairs(batch_size=4104, length=8),
            np.zeros((4104, 2)),
            batch_size=4104,
            verbose=0,
            callbacks=[AlphaScheduler()],
        )


def test_schedule_of_the_step():
    model = _model()
    pairs = make_pairs(batch_size=32)
    opponent = model.predict(pairs, verbose=0)
    alphas = _Alphas()
    schedule = keras.optimizers.schedules.PolynomialDecay(2.0, 4, 0.0)
    model.fit(
        pairs,
        opponent,
        batch_size=8,
        verbose=0,
        callbacks=[AlphaSchedule(schedule), alphas],
    )
    np.testing.assert_allclose(alphas.values, [2.0, 1.5, 1.0, 0.5], rtol=1e-6)


def test_schedule_that_is_none():
    with pytest.raises(ValueError, match="function of the step"):
        AlphaSchedule(1.5)
    model = _model()
    for alpha in (-3.0, 200.0):
        with pytest.raises(ValueError, match=r"in \[0, 100\]"):
            model.fit(
                make_pairs(),
                np.zeros((8, 2)),
                verbose=0,
                callbacks=[AlphaSchedule(lambda step, alpha=alpha: alpha)],
            )


def test_a_gap_that_is_not_finite_and_rows_of_no_weight():
    model = _model()
    pairs, opponent, _ = _pairs_and_opponent(8)

    def fit(gap, weight):
        model.fit(
            pairs,
            opponent,
            sample_weight=np.full(8, weight, "float32"),
            verbose=0,
            callbacks=[AlphaScheduler(gap=gap)],
        )
        return float(model.alpha.value)

    assert fit(_Gaps(0.5), 1.0) < 2.0
    assert fit(_Gaps(), 0.0) == 2.0  # that of the loss
    with pytest.raises(FloatingPointError, match="gap is nan.*_Gaps"):
        fit(_Gaps(np.nan), 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_alpha": 2.0, "max_alpha": 1.0}, r"`min_alpha`.*\[0, 1.0\]"),
        ({"max_alpha": 101.0}, r"`max_alpha`.*\[0, 100\]"),
        ({"coefficient": -1.0}, "`coefficient`.* -1.0"),
        ({"coefficient": float("nan")}, "`coefficient`"),
        ({"coefficient": "0.5"}, "`coefficient` has to be a number"),
        ({"min_effective_sample_size": 1.5}, r"\[0, 1\]"),
        ({"gap": "margin"}, r"method `gap\(pairs\)`"),
        ({"gap": RenyiGap}, r"method `gap\(pairs\)`"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaScheduler(**options)


@pytest.mark.parametrize(
    "callback", [AlphaScheduler(), AlphaSchedule(lambda step: 1.0)]
)
def test_a_loss_without_order(callback):
    """Its logs would show an order that nothing follows."""
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    for loss, is_told in ((SPIN(), True), (IRIS(), False)):
        model.compile(optimizer="sgd", loss=loss)
        callback.set_model(model)
        if is_told:
            name = type(callback).__name__
            with pytest.warns(UserWarning, match=f"SPIN has no order: {name}"):
                callback.on_train_begin()
        else:
            callback.on_train_begin()
