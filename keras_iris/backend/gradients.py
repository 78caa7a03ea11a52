"""The norm of a step's gradients."""

from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

Tensor = Any


def gradient_norm(
    gradients: Sequence[Tensor | None], scale: Callable[[Tensor], Tensor]
) -> Tensor:
    """The norm of all gradients together, before any clipping.

    Args:
        gradients: Of the variables; None where the loss doesn't depend on one.
        scale: What the loss was multiplied with before it was differentiated,
            as a function.

    Returns:
        A float32 scalar.
    """
    squares = [
        ops.sum(ops.square(ops.cast(gradient, "float32")))
        for gradient in gradients
        if gradient is not None
    ]
    return ops.sqrt(sum(squares, ops.zeros(()))) / scale(ops.ones(()))
