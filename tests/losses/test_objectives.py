"""Every objective: vectors, oracles, gradients, invariances, precision."""

import keras
import numpy as np
import oracles
import pytest
from backend_helpers import gradient, precision

from keras_iris.losses import IRIS, SFT, SPACE, SPIF, SPIN, TSPIN, tilted_risk

TOLERANCE = {"float32": 1e-5, "float64": 1e-6}

# Expected numbers of this file's first two tests: computed once in float64
# NumPy by a program that shares no code with the package.
REAL, SYNTHETIC = [0.5, -1.0, 2.0, 0.0], [-0.25, 1.5, -2.0, 0.75]
VECTORS = [
    (IRIS(0), 0.10888754),
    (IRIS(0.25), 0.21108765),
    (IRIS(0.5), 0.26893305),
    (IRIS(1), 0.25531722),
    (IRIS(1.5), 0.12513344),
    (IRIS(2), -0.03593773),
    (IRIS(3), -0.26806280),
    (SPIN(1.0), 1.03019542),
    (SPIN(0.1), 0.68166374),
    (SPACE(1.0), 1.53714139),
    (SPACE(3.0), 2.53652113),
    (SPIF(1.0), 4.28125),
]
# (alpha, annotated weights, synthetic weights)
WEIGHTS = [
    (0, [0.135989, 0.609460, 0.030343, 0.224208], [0.25] * 4),
    (
        0.25,
        [0.170653, 0.525647, 0.055403, 0.248298],
        [0.223289, 0.345837, 0.144166, 0.286709],
    ),
    (
        0.5,
        [0.205196, 0.434400, 0.096928, 0.263477],
        [0.183001, 0.438996, 0.076286, 0.301717],
    ),
    (1, [0.25] * 4, [0.103663, 0.596538, 0.018014, 0.281785]),
    (
        1.5,
        [0.228929, 0.108138, 0.484643, 0.178290],
        [0.051656, 0.713094, 0.003742, 0.231508],
    ),
    (
        2,
        [0.158445, 0.035354, 0.710100, 0.096102],
        [0.024076, 0.797296, 0.000727, 0.177901],
    ),
    (
        3,
        [0.046505, 0.002315, 0.934072, 0.017108],
        [0.004725, 0.900354, 0.000025, 0.094897],
    ),
]
# (class, argument, oracle)
OBJECTIVES = [
    *((IRIS, a, oracles.iris) for a in (0, 0.25, 0.5, 1, 1.0001, 1.5, 2, 3)),
    (SPIN, 1.0, oracles.spin),
    (SPIN, 0.1, oracles.spin),
    (SPACE, 1.0, oracles.space),
    (SPACE, 3.0, oracles.space),
    (SPIF, 1.0, oracles.spif),
    (SPIF, 0.3, oracles.spif),
]
LOSSES = [
    lambda: IRIS(0.0),
    lambda: IRIS(0.5),
    lambda: IRIS(1.0),
    lambda: IRIS(2.0),
    lambda: SPIN(0.1),
    lambda: SPACE(2.0),
    lambda: SPIF(0.5),
    lambda: SFT(),
    lambda: IRIS(2.0, sft_weight=0.3),
]
each_loss = pytest.mark.parametrize("make_loss", LOSSES)


def _number(tensor):
    return float(keras.ops.convert_to_numpy(tensor))


def _pairs(real, synthetic, dtype="float32"):
    """Opponent and policy log-probs of given log-ratios."""
    log_ratio = np.stack([real, synthetic], axis=1)
    opponent = -np.arange(1.0, log_ratio.size + 1).reshape(log_ratio.shape)
    return opponent.astype(dtype), (opponent + log_ratio).astype(dtype)


def _random_pairs(num_rows=6, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    log_ratio = rng.normal(scale=scale, size=(2, num_rows))
    return _pairs(*log_ratio)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "expected"), VECTORS)
def test_vectors(loss, expected, dtype):
    with precision(dtype):
        loss = loss.from_config(loss.get_config())  # of this float type
        value = loss(*_pairs(REAL, SYNTHETIC, dtype))
        assert keras.backend.standardize_dtype(value.dtype) == dtype
    # The vectors have 8 digits; around 0 those count, not the relative ones.
    assert _number(value) == pytest.approx(
        expected, rel=TOLERANCE[dtype], abs=1e-6
    )


@pytest.mark.parametrize(("alpha", "real", "synthetic"), WEIGHTS)
def test_gradient_of_iris_is_the_importance_weights(alpha, real, synthetic):
    y_true, y_pred = _pairs(REAL, SYNTHETIC)
    slope = gradient(lambda x: IRIS(alpha)(y_true, x), y_pred)
    np.testing.assert_allclose(-slope[:, 0], real, atol=1e-6)
    np.testing.assert_allclose(slope[:, 1], synthetic, atol=1e-6)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (2, -0.531176),
        (0.5, -0.506720),
        (1, -0.509757),
        (1.0001, -0.509759),
        (0, -0.512060),
    ],
)
def test_vectors_of_unequal_lists(alpha, expected):
    real = np.array([0.5, -0.2, 1.0], "float32")
    synthetic = np.array([-0.3, 0.1, 0.4, -1.0], "float32")
    value = tilted_risk(-real, 1 - alpha) + tilted_risk(synthetic, alpha)
    assert _number(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, 1235.605551), (2, 780.549306)]
)
def test_vectors_of_large_log_ratios(alpha, expected):
    loss = IRIS(alpha)
    value = loss(*_pairs([120.0, -340.0, 55.0], [900.0, -800.0, 10.0]))
    assert _number(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("cls", "argument", "oracle"), OBJECTIVES)
@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 2.0, 0.0, 1.0, 3.0]])
@pytest.mark.parametrize("sft_weight", [0, 0.3])
def test_oracle(cls, argument, oracle, weight, sft_weight):
    y_true, y_pred = _random_pairs()
    real, synthetic = (y_pred - y_true).astype("float64").T
    kept = slice(None) if weight is None else np.flatnonzero(weight)
    given = None if weight is None else np.array(weight)[kept]
    expected = oracle(real[kept], synthetic[kept], argument, given)
    nll = -np.average(y_pred[kept, 0].astype("float64"), weights=given)
    expected += sft_weight * nll
    loss = cls(argument, sft_weight=sft_weight)
    value = _number(loss(y_true, y_pred, weight))
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_sft_is_the_nll_of_annotated_responses():
    y_true, y_pred = _random_pairs()
    expected = -np.average(y_pred[:, 0], weights=np.arange(6))
    value = SFT()(y_true * 0, y_pred, np.arange(6))
    assert _number(value) == pytest.approx(expected, rel=1e-5)


@each_loss
def test_finite_differences(make_loss):
    step, weight = 1e-5, np.arange(1.0, 5.0)
    with precision("float64"):
        loss = make_loss()
        y_true, y_pred = _pairs(REAL, SYNTHETIC, "float64")
        slope = gradient(lambda x: loss(y_true, x, weight), y_pred)
        for i, row in enumerate(np.eye(8).reshape(8, 4, 2)):
            up = _number(loss(y_true, y_pred + step * row, weight))
            down = _number(loss(y_true, y_pred - step * row, weight))
            expected = (up - down) / (2 * step)
            assert slope.flat[i] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_iris_is_continuous_in_alpha(limit):
    y_true, y_pred = _random_pairs(scale=5.0)

    def value_and_gradient(alpha):
        loss = IRIS(alpha)
        slope = gradient(lambda x: loss(y_true, x), y_pred)
        return np.array([_number(loss(y_true, y_pred)), *slope.ravel()])

    at_limit = value_and_gradient(limit)
    for distance in (1e-3, 1e-5, 1e-7, 1e-30):
        for sign in (1, -1) if limit else (1,):
            near = value_and_gradient(limit + sign * distance)
            # d loss / d alpha is of the order of the variance, 25.
            np.testing.assert_allclose(
                near, at_limit, atol=50 * distance + 3e-6
            )


@each_loss
def test_no_overflow(make_loss):
    loss = make_loss()
    y_true, y_pred = _pairs(
        [1000.0, -1000.0, 3.0, 1000.0], [-1000.0, 1000.0, 0.0, 1000.0]
    )
    assert np.isfinite(_number(loss(y_true, y_pred)))
    slope = gradient(lambda x: loss(y_true, x), y_pred)
    assert np.isfinite(slope).all()
    if not isinstance(loss, SPIF):  # whose rewards are bounded
        assert (slope[:, 0] <= 0).all()
        assert (slope[:, 1] >= 0).all()


@each_loss
def test_order_of_rows_does_not_matter(make_loss):
    loss = make_loss()
    y_true, y_pred = _random_pairs()
    weight = np.array([1.0, 0.5, 2.0, 0.0, 1.0, 3.0], "float32")
    order = np.random.default_rng(1).permutation(6)

    def gradient_of(rows):
        return gradient(
            lambda x: loss(y_true[rows], x, weight[rows]), y_pred[rows]
        )

    value = _number(loss(y_true, y_pred, weight))
    permuted = loss(y_true[order], y_pred[order], weight[order])
    assert _number(permuted) == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(
        gradient_of(order), gradient_of(np.arange(6))[order], atol=1e-6
    )


@each_loss
@pytest.mark.parametrize("junk", [np.nan, -np.inf])
def test_padding_rows_do_not_matter(make_loss, junk):
    loss = make_loss()
    y_true, y_pred = _random_pairs()
    rows = np.full((2, 2), junk, "float32")
    padded_true = np.concatenate([y_true, rows])
    padded_pred = np.concatenate([y_pred, rows])
    weight = [1.0] * 6 + [0.0] * 2
    value = _number(loss(padded_true, padded_pred, weight))
    assert value == pytest.approx(_number(loss(y_true, y_pred)), rel=1e-5)
    slope = gradient(lambda x: loss(padded_true, x, weight), padded_pred)
    expected = gradient(lambda x: loss(y_true, x), y_pred)
    np.testing.assert_allclose(slope[:6], expected, atol=1e-6)
    np.testing.assert_array_equal(slope[6:], 0.0)


@each_loss
def test_weights_are_repeats(make_loss):
    loss = make_loss()
    y_true, y_pred = _random_pairs(3)
    repeats = np.array([2, 1, 3])
    repeated = loss(
        np.repeat(y_true, repeats, 0), np.repeat(y_pred, repeats, 0)
    )
    for weight in (repeats, repeats[:, None], 0.1 * repeats):
        value = _number(loss(y_true, y_pred, weight))
        assert value == pytest.approx(_number(repeated), rel=1e-5)


@each_loss
def test_a_nan_that_counts_is_not_hidden(make_loss):
    y_true, y_pred = _random_pairs()
    y_pred[2, 0] = np.nan
    assert np.isnan(_number(make_loss()(y_true, y_pred)))


@each_loss
@pytest.mark.parametrize(
    ("dtype", "policy"),
    [
        ("float16", "mixed_float16"),
        ("bfloat16", "mixed_bfloat16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_half_precision(make_loss, dtype, policy):
    y_true, y_pred = (keras.ops.cast(y, dtype) for y in _random_pairs(64))
    wide = [keras.ops.cast(y, "float32") for y in (y_true, y_pred)]
    expected = _number(make_loss()(*wide))
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy(policy)
        value = make_loss()(y_true, y_pred)
    finally:
        keras.config.set_dtype_policy(before)
    assert keras.backend.standardize_dtype(value.dtype) == "float32"
    assert _number(value) == pytest.approx(expected, rel=1e-6)


def test_tspin_of_three_responses():
    policy = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    loss = TSPIN(0.7, 0.3)
    opponent = np.full((6, 3), 7.0, "float32")  # which doesn't matter
    for weight in (None, np.array([1, 0, 2, 0.5, 1, 3], "float32")):
        expected = oracles.tspin(policy, 0.7, 0.3, weight)
        assert _number(loss(opponent, policy, weight)) == pytest.approx(
            expected, rel=1e-6
        )
    # Without responses of an earlier policy there is the first term alone.
    expected = oracles.tspin(policy, 0.7, 0.0)
    value = loss(opponent[:, :2], policy[:, :2])
    assert _number(value) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "shapes", "allowed"),
    [
        (IRIS(), [(4, 3), (4, 3)], r"of one shape \(batch, 2\): annotated"),
        (TSPIN(), [(4, 2), (4, 3)], r"or \(batch, 3\)"),
        (TSPIN(), [(4, 4), (4, 4)], r"or \(batch, 3\)"),
    ],
)
def test_numbers_of_responses_that_are_refused(loss, shapes, allowed):
    with pytest.raises(ValueError, match=allowed):
        loss(*(np.zeros(shape, "float32") for shape in shapes))
