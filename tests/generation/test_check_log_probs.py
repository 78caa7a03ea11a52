import numpy as np
import pytest

from keras_iris.generation import check_log_probs


def test_returns_the_mean_over_tokens():
    # (1 + 2) nats over (10 + 90) tokens.
    assert check_log_probs([-9, -80], [-10, -78], [10, 90]) == pytest.approx(
        0.03
    )


def test_in_single_tokens_nothing_cancels():
    engine, trainer = [-1.0, -2.0], [-1.5, -1.5]
    assert check_log_probs([sum(engine)], [sum(trainer)], [2]) == 0.0
    with pytest.raises(ValueError, match="0.5 nats per token"):
        check_log_probs(engine, trainer)


def test_nothing_to_compare():
    assert check_log_probs([], [], []) == 0.0


@pytest.mark.parametrize(
    ("engine", "trainer", "tokens", "message"),
    [
        (
            [-10.0, -20.0],
            [-10.0, -30.0],
            [10, 10],
            "0.5 nats per token, expected at most 0.05. The worst is "
            r"number 1: -20 against -30 nats over 10 token\(s\). Check",
        ),
        ([np.nan], [-1.0], [1], "differ by nan nats"),
        ([-1.0], [-1.0, -2.0], [1, 1], r"received shapes \(1,\), \(2,\)"),
    ],
)
def test_differences_are_refused(engine, trainer, tokens, message):
    with pytest.raises(ValueError, match=message):
        check_log_probs(engine, trainer, tokens)
