"""A step of training beside the same in NumPy."""

from typing import Any

import keras
import keras_hub
import numpy as np

import keras_iris

_ALPHA = 0.5
_EPSILON = 1e-6
_STEP = 1e-5  # of central differences, in float64
# Products on GPUs may have 10 bits after the point.
_TOLERANCE = 1e-2


def self_test() -> dict[str, Any]:
    """Trains embeddings, a norm and logits for a step of IRIS, micro-batched.

    Returns:
        The loss by Keras and by NumPy, how far its gradient is from central
        differences of the NumPy loss at most, in units of the largest entry,
        and a list of problems.
    """
    rng = np.random.default_rng(0)
    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=11,
        num_layers=0,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        layer_norm_epsilon=_EPSILON,
        tie_word_embeddings=True,
        dtype="float32",
    )
    causal_lm = keras_hub.models.QwenCausalLM(backbone, preprocessor=None)
    variables = causal_lm.trainable_variables
    weights = [
        0.5 * rng.normal(size=v.shape) + (v.ndim == 1) for v in variables
    ]
    for variable, value in zip(variables, weights, strict=True):
        variable.assign(value)
    token_ids = rng.integers(0, 11, (4, 2, 6))
    mask = np.arange(6) >= rng.integers(1, 4, (4, 1, 1))
    mask = np.broadcast_to(mask, token_ids.shape)
    opponent = rng.normal(-8.0, 1.0, (4, 2))

    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.SGD(1.0),
        loss=keras_iris.losses.IRIS(_ALPHA),
        micro_batch_size=2,
    )
    inputs = {
        "token_ids": token_ids.astype("int32"),
        "padding_mask": np.ones_like(mask),
        "response_mask": mask,
    }
    loss = float(model.train_on_batch(inputs, opponent.astype("float32")))
    after = [keras.ops.convert_to_numpy(v) for v in variables]

    def expected(values: list[np.ndarray]) -> float:
        return _iris(_log_probs(values, token_ids, mask) - opponent)

    error = _compare(weights, after, expected)
    found = {"loss": loss, "numpy_loss": expected(weights)}
    is_close = np.isclose(loss, found["numpy_loss"], rtol=_TOLERANCE)
    problems = []
    if not (is_close and error < _TOLERANCE):
        problems.append(
            f"A step of training differs from NumPy's: loss {loss}, expected "
            f"{found['numpy_loss']}; gradient off by {error:.2g} of its "
            "largest entry. Don't trust results of this machine."
        )
    return found | {"gradient_error": error, "problems": problems}


def _log_probs(
    values: list[np.ndarray], token_ids: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """Of responses, `(batch, 2)`, in nats: the next token's from each."""
    table, scale = values
    hidden = table[token_ids[..., :-1]]  # (batch, 2, time - 1, width)
    size = np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + _EPSILON)
    logits = hidden / size * scale @ table.T
    tokens = np.take_along_axis(logits, token_ids[..., 1:, None], -1)[..., 0]
    log_probs = tokens - np.log(np.exp(logits).sum(axis=-1))
    return np.where(mask[..., 1:], log_probs, 0).sum(axis=-1)


def _iris(log_ratios: np.ndarray) -> float:
    """R_{1-alpha}(-r of annotated) + R_alpha(r of synthetic)."""
    real, synthetic = log_ratios.T

    def risk(values: np.ndarray, tilt: float) -> float:
        return float(np.log(np.mean(np.exp(tilt * values))) / tilt)

    return risk(-real, 1 - _ALPHA) + risk(synthetic, _ALPHA)


def _compare(
    before: list[np.ndarray], after: list[np.ndarray], loss: Any
) -> float:
    """How far the step of SGD is from minus the loss's gradient."""
    errors, sizes = [], []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        for place in np.ndindex(old.shape):
            sides = []
            for sign in (1, -1):
                values = [value.copy() for value in before]
                values[i][place] += sign * _STEP
                sides.append(loss(values))
            gradient = (sides[0] - sides[1]) / (2 * _STEP)
            errors.append(abs(old[place] - new[place] - gradient))
            sizes.append(abs(gradient))
    return float(max(errors) / max(sizes))
