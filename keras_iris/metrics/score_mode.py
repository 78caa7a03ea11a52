"""Which way a held-out score is better."""

import re
from collections.abc import Mapping
from typing import Any, Literal

# Parts of names; short ones only where they stand alone.
_ALONE = "(?<![a-z0-9])({})(?![a-z0-9])"
_MAX = "accuracy|exact_?match|bleu|rouge|precision|recall|win_?rate|"
_MAX += _ALONE.format("acc|em|f1|pass@[0-9]+")
_MIN = "nll|perplexity|loss|error|bits_per|" + _ALONE.format("ppl|wer|cer")
# What describes training, not how good the model is; and what is a spread.
_NEITHER = "margin|log_ratio|divergence|synthetic|stderr|"
_NEITHER += _ALONE.format("alpha|gap|ess|std")


def score_mode(
    name: str, score_modes: Mapping[str, Any] | None = None
) -> Literal["min", "max"] | None:
    """Says whether a score is better where it is lower or higher.

    Training values such as the margin have no mode: a growing margin is not
    progress. Nor have names that speak of both.

    Args:
        name: Name of the score, such as `"word_accuracy"`.
        score_modes: The user's own, by name; they count first.

    Returns:
        `"min"`, `"max"`, or None where the name doesn't say.

    Raises:
        ValueError: `score_modes` isn't a dictionary of `"min"` and `"max"`.
    """
    modes = {} if score_modes is None else score_modes
    if not isinstance(modes, Mapping) or any(
        mode not in ("min", "max") for mode in modes.values()
    ):
        raise ValueError(
            "Expected score_modes to give 'min' or 'max' for a score's name, "
            f"such as {{'f1': 'max'}}. Received: {score_modes!r}. Leave out "
            "the scores that have no direction."
        )
    if name in modes:
        return modes[name]
    is_max, is_min, is_neither = (
        bool(re.search(part, name.lower())) for part in (_MAX, _MIN, _NEITHER)
    )
    if is_neither or is_max == is_min:
        return None
    return "max" if is_max else "min"
