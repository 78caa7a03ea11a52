import numpy as np
import pytest

from keras_iris.generation import check_log_probs


def test_returns_the_mean_over_tokens():
    # (1 + 2) nats over (10 + 90) tokens.
    assert check_log_probs([-9, -80], [-10, -78], [10, 90]) == pytest.approx(
        0.03
    )


def test_in_single_tokens_nothing_cancels():
    engine, trainer = np.full((2, 100), -2.0)
    engine[::2] -= 0.5
    engine[1::2] += 0.5
    assert check_log_probs([engine.sum()], [trainer.sum()], [100]) == 0.0
    with pytest.raises(ValueError, match="0.5 nats per token"):
        check_log_probs(engine, trainer)


def test_nothing_to_compare():
    assert check_log_probs([], [], []) == 0.0


@pytest.mark.parametrize("num_tokens", [16, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_passes_and_other_weights_do_not(dtype, num_tokens):
    """Of a softmax over 1,000 ids, from logits of another precision."""
    rng = np.random.default_rng(0)
    logits, others = rng.normal(0, 3, (2, num_tokens, 1000)).astype("float32")
    trainer = log_probs_of(logits)
    # Noise like the rounding of bfloat16, or less: 0.046 nats on average.
    noise = {"float32": 1e-5, "float16": 0.007, "bfloat16": 0.046}[dtype]
    noisy = logits + rng.laplace(0, noise, logits.shape)
    difference = check_log_probs(log_probs_of(noisy), trainer, dtype=dtype)
    assert 0.3 * noise < difference < 3 * noise
    with pytest.raises(ValueError, match=f"nats per token.*{dtype}"):
        check_log_probs(log_probs_of(others), trainer, dtype=dtype)


def log_probs_of(logits):
    """Of the first id."""
    return logits[:, 0] - np.log(np.exp(logits.astype("float64")).sum(-1))


def test_few_tokens_scatter_more_and_the_limit_is_an_argument():
    few, many = np.full(4, 0.5), np.full(400, 0.5)
    assert check_log_probs(-few, 0 * few) == 0.5  # limit 0.2 * (1 + 4 / 2)
    with pytest.raises(ValueError, match="at most 0.24 for rounding in bf"):
        check_log_probs(-many, 0 * many)
    assert check_log_probs(-many, 0 * many, max_difference_nats=0.5) == 0.5
    with pytest.raises(ValueError, match="at most 0.4 for"):
        check_log_probs(-few, 0 * few, max_difference_nats=0.4)


@pytest.mark.parametrize(
    ("engine", "trainer", "tokens", "message"),
    [
        (
            [-10.0, -20.0],
            [-10.0, -420.0],
            [200, 200],
            "1 nats per token, expected at most 0.24 .* The worst is "
            r"number 1: -20 against -420 nats over 200 token\(s\). Check",
        ),
        ([np.nan], [-1.0], [1], "differ by nan nats"),
        ([-1.0], [-1.0, -2.0], [1, 1], r"received shapes \(1,\), \(2,\)"),
    ],
)
def test_differences_are_refused(engine, trainer, tokens, message):
    with pytest.raises(ValueError, match=message):
        check_log_probs(engine, trainer, tokens)
