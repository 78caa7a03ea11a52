import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.callbacks import (
    AlphaSchedule,
    AlphaScheduler,
    DivergenceGap,
    MarginGap,
    TokenGap,
)
from keras_iris.losses import IRIS
from keras_iris.metrics import PairBatch


def _model(**options):
    model = keras_iris.SelfPlayModel(make_causal_lm())
    model.compile(
        optimizer=keras.optimizers.SGD(0.02), loss=IRIS(2.0), **options
    )
    return model


def _batch(policy, opponent=None, num_tokens=None):
    policy = np.asarray(policy, "float64")
    shape = policy.shape
    return PairBatch(
        np.zeros(shape) if opponent is None else np.asarray(opponent),
        policy,
        np.ones(shape) if num_tokens is None else np.asarray(num_tokens),
        np.ones(shape[0]),
    )


class _Alphas(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(self.model.alpha.value))


def test_estimators_by_hand():
    batch = _batch([[-4.0, -1.0], [-2.0, -2.0]], num_tokens=[[2, 3], [1, 3]])
    assert TokenGap()(batch, 1.0) == pytest.approx(6 / 3 - 3 / 6)
    assert MarginGap()(batch, 1.0) == pytest.approx((-3.0 + 0.0) / 2)
    # At alpha = 1: mean r(y) - log mean exp r(y').
    expected = -3.0 - np.log((np.exp(-1.0) + np.exp(-2.0)) / 2)
    assert DivergenceGap()(batch, 1.0) == pytest.approx(expected)


def test_divergence_is_minus_the_loss():
    rng = np.random.default_rng(0)
    policy, opponent = rng.normal(size=(2, 8, 2))
    for alpha in (0.0, 0.5, 1.0, 2.0):
        loss = IRIS(alpha)(opponent, policy)
        gap = DivergenceGap()(_batch(policy, opponent), alpha)
        assert gap == pytest.approx(-float(loss), rel=1e-5)


def test_order_falls_with_the_gap():
    scheduler = AlphaScheduler(0.5, 2.0, smoothing=0.0)
    state = np.array([0.0, 1.0, 0.0])
    orders = []
    for gap in (0.8, 0.4, 0.0, -1.0, 1.6):
        state = scheduler._smooth(state, gap)
        orders.append(scheduler._order(state))
    np.testing.assert_allclose(orders, [2.0, 1.25, 0.5, 0.5, 2.0], rtol=1e-6)


def test_moving_average_has_no_bias_at_the_start():
    scheduler = AlphaScheduler(smoothing=0.9)
    state = np.array([0.0, 1.0, 0.0])
    for _ in range(3):
        state = scheduler._smooth(state, 0.7)
        assert scheduler._order(state) == pytest.approx(2.0)


def test_guard_keeps_half_of_both_weights():
    scheduler = AlphaScheduler()
    rng = np.random.default_rng(0)
    batch = _batch(rng.normal(scale=1.2, size=(64, 2)))
    alpha = scheduler._capped(2.0, batch)
    real, synthetic = batch.log_ratio.T

    def smaller(order):
        return min(
            keras_iris.metrics.effective_sample_size(real, order - 1),
            keras_iris.metrics.effective_sample_size(synthetic, order),
        )

    assert 0 < alpha < 2
    assert smaller(alpha) >= 0.5
    assert smaller(alpha + 0.05) < 0.5


def test_guard_takes_the_best_where_no_order_keeps_enough():
    scheduler = AlphaScheduler()
    rng = np.random.default_rng(0)
    alpha = scheduler._capped(2.0, _batch(rng.normal(scale=20, size=(64, 2))))
    assert 0.3 < alpha < 0.7  # both tilts matter alike at 1/2


def test_guard_is_off_at_zero():
    scheduler = AlphaScheduler(min_effective_sample_size=0.0)
    batch = _batch(np.random.default_rng(0).normal(scale=20, size=(64, 2)))
    assert scheduler._capped(2.0, batch) == 2.0


def test_it_sets_alpha_within_an_epoch_without_compiling_again():
    model = _model()
    pairs = make_pairs(batch_size=32)
    opponent = model.predict(pairs, verbose=0)
    alphas = _Alphas()
    num_traces = 0
    call = model.call

    def counted(*args, **kwargs):
        nonlocal num_traces
        num_traces += 1
        return call(*args, **kwargs)

    model.call = counted

    class Falling:
        starts_at_zero = False
        gaps = iter([0.8, 0.6, 0.4, 0.2, 0.8, 0.6, 0.4, 0.2])

        def __call__(self, batch, alpha):
            return next(self.gaps)

    scheduler = AlphaScheduler(
        gap_estimator=Falling(), smoothing=0.0, min_effective_sample_size=0.0
    )
    model.fit(
        pairs, opponent, batch_size=8, verbose=0, callbacks=[scheduler, alphas]
    )
    traced = num_traces
    model.fit(
        pairs, opponent, batch_size=8, verbose=0, callbacks=[scheduler, alphas]
    )
    falling = [2.0, 1.625, 1.25, 0.875]
    np.testing.assert_allclose(alphas.values, 2 * falling, rtol=1e-5)
    if keras.backend.backend() != "torch":  # which traces nothing
        assert num_traces == traced


def test_state_is_saved_with_the_weights(tmp_path):
    model = _model()
    pairs = make_pairs(batch_size=16)
    opponent = model.predict(pairs, verbose=0)
    model.fit(
        pairs, opponent, batch_size=8, verbose=0, callbacks=[AlphaScheduler()]
    )
    model.save_weights(tmp_path / "m.weights.h5")
    other = _model()
    other.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(
        other.gap_state.numpy(), model.gap_state.numpy()
    )
    assert other.gap_state.numpy()[1] == pytest.approx(0.95**2)
    assert float(other.alpha.value) == float(model.alpha.value)


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


def test_a_gap_that_is_not_finite_and_rows_of_no_weight_change_nothing():
    class Gap:
        starts_at_zero = False
        value = 1.0

        def __call__(self, batch, alpha):
            return self.value

    gap, model = Gap(), _model()
    scheduler = AlphaScheduler(gap_estimator=gap)
    pairs = make_pairs()
    opponent = model.predict(pairs, verbose=0)

    def fit(weight):
        model.fit(
            pairs,
            opponent,
            sample_weight=np.full(8, weight, "float32"),
            verbose=0,
            callbacks=[scheduler],
        )
        return float(model.alpha.value), model.gap_state.numpy().tolist()

    before = fit(1.0)
    gap.value = float("nan")
    assert fit(1.0) == before
    gap.value = 0.5
    assert fit(0.0) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_alpha": 2.0, "max_alpha": 1.0}, "min_alpha <= max_alpha"),
        ({"max_alpha": 101.0}, "<= 100"),
        ({"smoothing": 1.0}, "`smoothing`"),
        ({"min_effective_sample_size": 1.5}, "share of the batch"),
        ({"update_every_batches": 0}, "`update_every_batches`"),
        ({"update_every_batches": 1.5}, "`update_every_batches`"),
        ({"gap_estimator": "margin"}, "has `starts_at_zero`"),
        ({"gap_estimator": MarginGap}, "has `starts_at_zero`"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        AlphaScheduler(**options)


def test_a_first_gap_that_is_not_positive():
    scheduler = AlphaScheduler(smoothing=0.0)
    state = np.array([0.0, 1.0, 0.0], "float32")
    with pytest.warns(UserWarning, match="The first gap is -0.5, not positive"):
        state = scheduler._smooth(state, -0.5)
    assert scheduler._order(state) == scheduler.min_alpha
    for gap, order in ((2.0, 2.0), (1.0, 1.25), (-1.0, 0.5)):
        state = scheduler._smooth(state, gap)
        assert scheduler._order(state) == pytest.approx(order)
