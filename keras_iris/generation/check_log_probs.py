"""Do the engine and the trainer have the same model?"""

import numpy as np
from numpy.typing import ArrayLike


def check_log_probs(
    engine_log_probs: ArrayLike,
    trainer_log_probs: ArrayLike,
    num_tokens: ArrayLike | None = None,
    max_difference_nats: float = 0.05,
) -> float:
    """Compares an engine's log-probs with those of the training forward.

    Self-play needs responses of the very opponent whose log-probs the loss
    uses. An engine with other weights, another template or other numerics
    breaks that without any other sign.

    Args:
        engine_log_probs: Log-probs of tokens as the engine gave them, in
            nats, or sums of them over completions; of shape `(n,)`.
        trainer_log_probs: The same of the training forward.
        num_tokens: Tokens in each sum, of shape `(n,)`; None where each
            log-prob is a token's.
        max_difference_nats: The largest mean absolute difference per token
            that is taken for rounding.

    Returns:
        The mean over tokens of the absolute difference, in nats. In a sum
        differences can cancel.

    Raises:
        ValueError: If that is above `max_difference_nats` or not a number.
    """
    engine = np.asarray(engine_log_probs, "float64")
    trainer = np.asarray(trainer_log_probs, "float64")
    if num_tokens is None:
        num_tokens = np.ones_like(engine)
    tokens = np.asarray(num_tokens, "float64")
    if not engine.shape == trainer.shape == tokens.shape or engine.ndim != 1:
        raise ValueError(
            "Expected three arrays of one shape (n,), received "
            f"shapes {engine.shape}, {trainer.shape} and {tokens.shape}."
        )
    if tokens.sum() == 0:
        return 0.0
    difference = float(np.abs(engine - trainer).sum() / tokens.sum())
    if not difference <= max_difference_nats:
        worst = int(np.argmax(np.abs(engine - trainer) / tokens.clip(1)))
        raise ValueError(
            "The engine's log-probs and the training forward's differ by "
            f"{difference:.3g} nats per token, expected at most "
            f"{max_difference_nats}. The worst is number {worst}: "
            f"{engine[worst]:.4g} against {trainer[worst]:.4g} nats over "
            f"{int(tokens[worst])} token(s). Check that the engine has the "
            "current weights, samples at temperature 1 without top-k, top-p "
            "or penalties, gets the same prompt ids, and computes in a "
            "precision like the trainer's."
        )
    return difference
