"""Do the engine and the trainer have the same model?"""

import numpy as np
from numpy.typing import ArrayLike

# The mean absolute difference per token that is taken for rounding, in nats.
# GPUs multiply float32 in ten bits, as float16. A bfloat16 server and a trainer
# were 0.046 apart in a public report (vllm-project/vllm#18352). Wrong weights
# or prompts are nats apart.
_ROUNDING = {"float32": 0.05, "float16": 0.05, "bfloat16": 0.2}


def check_log_probs(
    engine_log_probs: ArrayLike,
    trainer_log_probs: ArrayLike,
    num_tokens: ArrayLike | None = None,
    *,
    dtype: str = "bfloat16",
    max_difference_nats: float | None = None,
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
        dtype: The coarsest that engine and trainer compute in, or that the
            weights went through between them.
        max_difference_nats: The largest mean absolute difference per token
            that is taken for rounding. By default 0.05 in float32 and
            float16, 0.2 in bfloat16 and others, times `1 + 4 / sqrt(t)` over
            `t` tokens: a mean of few scatters.

    Returns:
        The mean over tokens of the absolute difference, in nats. In a sum
        differences can cancel.

    Raises:
        ValueError: If that is above the limit or not a number.
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
    total = tokens.sum()
    if total == 0:
        return 0.0
    limit = max_difference_nats
    if limit is None:
        rounding = _ROUNDING.get(dtype, _ROUNDING["bfloat16"])
        limit = rounding * (1 + 4 / np.sqrt(total))
    difference = float(np.abs(engine - trainer).sum() / total)
    if not difference <= limit:
        worst = int(np.argmax(np.abs(engine - trainer) / tokens.clip(1)))
        raise ValueError(
            "The engine's log-probs and the training forward's differ by "
            f"{difference:.3g} nats per token, expected at most {limit:.3g} "
            f"for rounding in {dtype}. The worst is number {worst}: "
            f"{engine[worst]:.4g} against {trainer[worst]:.4g} nats over "
            f"{int(tokens[worst])} token(s). Check that the engine has the "
            "current weights, samples at temperature 1 without top-k, top-p "
            "or penalties and gets the same prompt ids; if it only rounds "
            "more coarsely, pass it `max_difference_nats`."
        )
    return difference
