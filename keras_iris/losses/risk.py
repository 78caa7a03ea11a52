"""Tilted risks: log-mean-exp at every temperature."""

from typing import Any, NamedTuple

import keras
from keras import ops

Tensor = Any


class Risk(NamedTuple):
    """One term of an objective: `weight * tilted_risk(values, tilt)`.

    Attributes:
        values: Per-example losses, shape `(batch,)`.
        tilt: The tilt; the number 0 means a mean over examples.
        weight: Factor of the term.
    """

    values: Tensor
    tilt: Tensor | float = 0
    weight: float = 1.0


# A tilt below it is 0: the risk differs from the mean by about
# tilt * variance / 2.
_SMALLEST_TILT = 1e-15


def tilted_risk(
    values: Tensor, tilt: Tensor | float, sample_weight: Tensor | None = None
) -> Tensor:
    """The tilted mean `(1/t) log sum_i p_i exp(t f_i)`.

    A tilt `t > 0` looks at the large values, `t < 0` at the small ones, and
    `t = 0` gives the mean. Value and gradient are continuous through 0, and
    nothing overflows. It does not differentiate with respect to the tilt.

    Args:
        values: Per-example values `f`, shape `(batch,)`.
        tilt: The tilt `t`: a number, variable or scalar tensor.
        sample_weight: Weights of shape `(batch,)`, of which negative ones
            count as 0, or None for ones. They are normalised, `p = w /
            sum(w)`: with any other sum there is no limit at `t = 0`. A value
            of weight 0 may be anything, NaN included; where all weights are 0
            the risk is 0.

    Returns:
        A scalar, float32 or wider.

    Examples:
        >>> values = [1.0, 2.0, 6.0]
        >>> round(float(tilted_risk(values, 0.0)), 4)
        3.0
        >>> round(float(tilted_risk(values, 2.0)), 4)
        5.4509

    Reference:
        Li et al., "Tilted empirical risk minimization", arXiv 2007.01162,
        equation 2.
    """
    values, tilt, p = _prepare(values, tilt, sample_weight)
    shift = _shift(values, tilt, p)
    excess_values = ops.where(p > 0, values - shift, 0.0)
    mean = ops.sum(p * excess_values)
    is_zero = ops.abs(tilt) < _SMALLEST_TILT
    # `where` before and after: the branch not taken has a finite gradient.
    z = ops.where(is_zero, 0.0, tilt) * excess_values  # <= 0
    tilted = _log_mean_exp(z, p) / ops.where(is_zero, 1.0, tilt)
    return shift + ops.where(is_zero, mean, tilted)


def tilted_weights(
    values: Tensor, tilt: Tensor | float, sample_weight: Tensor | None = None
) -> Tensor:
    """The importance weights of a tilted risk: its gradient in the values.

    Args:
        values: Per-example values `f`, shape `(batch,)`.
        tilt: The tilt `t`: a number, variable or scalar tensor.
        sample_weight: Weights of shape `(batch,)`, of which negative ones
            count as 0, or None for ones.

    Returns:
        Tensor of shape `(batch,)`, float32 or wider: `p_i exp(t f_i)` divided
        by its sum, `softmax(t f + log p)`; zeros where all weights are 0.

    Reference:
        Li et al., "Tilted empirical risk minimization", arXiv 2007.01162,
        lemma 1.
    """
    values, tilt, p = _prepare(values, tilt, sample_weight)
    z = tilt * ops.where(p > 0, values - _shift(values, tilt, p), 0.0)
    weights = p * ops.exp(z)
    total = ops.sum(weights)
    return weights / ops.where(total == 0, 1.0, total)


def _prepare(
    values: Tensor, tilt: Tensor | float, sample_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, tilt and normalised weights in one float type."""
    values = ops.convert_to_tensor(values)
    # Not `result_type`, which narrows float64 on JAX and PyTorch.
    is_wide = keras.backend.standardize_dtype(values.dtype) == "float64"
    dtype = "float64" if is_wide else "float32"
    values = ops.cast(values, dtype)
    if sample_weight is None:
        weight = ops.ones_like(values)
    else:
        weight = ops.cast(ops.convert_to_tensor(sample_weight), dtype)
        weight = ops.relu(weight)
        if len(weight.shape) != 1:
            raise ValueError(
                "`sample_weight` has to be of shape (batch,). Received: shape "
                f"{tuple(weight.shape)}"
            )
    total = ops.sum(weight)
    p = weight / ops.where(total == 0, 1.0, total)
    values = ops.where(p > 0, values, 0.0)
    return values, ops.cast(ops.convert_to_tensor(tilt), dtype), p


def _shift(values: Tensor, tilt: Tensor, p: Tensor) -> Tensor:
    """The value at which `tilt * value` is largest, as a constant."""
    is_row = p > 0
    # Their own value for rows of weight 0 would do harm; infinity has none.
    infinity = float("inf")
    largest = ops.max(ops.where(is_row, values, -infinity))
    smallest = ops.min(ops.where(is_row, values, infinity))
    shift = ops.where(tilt > 0, largest, smallest)
    return ops.stop_gradient(ops.where(ops.any(is_row), shift, 0.0))


def _log_mean_exp(z: Tensor, p: Tensor) -> Tensor:
    """`log sum_i p_i exp(z_i)` for `max z = 0`, exact also where z is tiny."""
    excess = ops.sum(p * ops.expm1(z))  # mean of exp(z), minus 1
    # log1p has no cancellation near 0, log none near -1.
    is_near = excess > -0.5
    near = ops.log1p(ops.where(is_near, excess, 0.0))
    mean = ops.sum(p * ops.exp(z))
    far = ops.log(ops.where(is_near, 1.0, mean))
    return ops.where(is_near, near, far)
