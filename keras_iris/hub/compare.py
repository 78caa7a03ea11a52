"""Models that no test of keras_iris covers, beside transformers' own."""

import importlib.util
import warnings
from pathlib import Path

import keras
import numpy as np
from keras import ops

_TOKENS = np.arange(1, 9, dtype="int32")[None]
# Mean differences of log-probs, in nats. Wrong models are off by far more,
# rounding in half precision by less.
_TOLERANCES = {"float32": 1e-3}
_HALF_TOLERANCE = 0.25


def check_untested(
    causal_lm: keras.Model, folder: Path, model_type: str
) -> None:
    """Says what is known of a model of an architecture without a row.

    Args:
        causal_lm: What KerasHub made of the folder.
        folder: A Hugging Face folder.
        model_type: That of its config.json.

    Raises:
        ValueError: If transformers, where it is installed with PyTorch, gives
            other log-probs for a few tokens.
    """
    needed = ("transformers", "torch")
    if all(importlib.util.find_spec(name) for name in needed):
        difference = _difference(causal_lm, folder)
        tolerance = _TOLERANCES.get(causal_lm.compute_dtype, _HALF_TOLERANCE)
        if not difference <= tolerance:
            raise ValueError(
                f"KerasHub's {type(causal_lm).__name__} isn't the model in "
                f"{folder}: its log-probs are off by {difference:.2g} nats "
                f"on average from those of transformers, expected at most "
                f"{tolerance}. Use another checkpoint."
            )
        known = "a few tokens were compared with transformers"
    else:
        known = (
            "nothing was compared, which `pip install transformers torch` "
            "would change"
        )
    warnings.warn(
        f"keras_iris has no tests for models of type {model_type!r}: {known}. "
        "It trains and generates in this process; `keras_iris.export` can't "
        "write it, so engines that need a folder can't answer with it.",
        stacklevel=5,
    )


def _difference(causal_lm: keras.Model, folder: Path) -> float:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32"
    )
    model.eval().requires_grad_(False)
    # In place of PyTorch's own import, which only keras_iris.backend has.
    inputs = transformers.BatchEncoding(
        {"input_ids": _TOKENS.astype("int64")}, tensor_type="pt"
    )
    expected = model(**inputs).logits.numpy()
    logits = causal_lm(
        {"token_ids": _TOKENS, "padding_mask": np.ones_like(_TOKENS)}
    )
    log_probs, expected = (
        ops.convert_to_numpy(ops.log_softmax(ops.cast(x, "float32")))
        for x in (logits, expected)
    )
    return float(np.abs(log_probs - expected).mean())
