"""IRIS, the objective of adjustable order."""

import numbers
from typing import Any

import keras

from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class IRIS(SelfPlayLoss):
    """Two independent tilted risks, of order alpha.

        L = R_{1-alpha}(-r over annotated) + R_alpha(r over synthetic)

    with the log-ratio `r = log p_policy - log p_opponent`. It is minus the
    variational Rényi functional: over all `r` its minimum is
    `-D_alpha(p_data || p_opponent) / alpha`, at a policy equal to the data.
    `alpha = 1` is the Donsker-Varadhan form of the KL divergence, `alpha = 0`
    the reverse KL, `alpha = 1/2` is symmetric, `alpha = 2` chi-squared.

    Args:
        alpha: The order, a number in [0, 100] or a scalar Keras variable.
            `SelfPlayModel.compile` replaces it by `model.alpha`, which takes
            its value.
        sft_weight: Weight of the anchor, see `SelfPlayLoss`. In micro-batches
            it takes another pass over the annotated responses.
        name: Name of the loss.

    Raises:
        ValueError: `alpha` or `sft_weight` is out of range.

    Examples:
        >>> loss = IRIS(alpha=0.5)
        >>> opponent = [[-3.0, -2.0], [-4.0, -5.0]]
        >>> float(loss(opponent, opponent))
        0.0

    Reference:
        IRIS, arXiv 2604.20933; Birrell et al., arXiv 2007.03814.
    """

    is_separable = True

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        sft_weight: float = 0.0,
        name: str = "iris",
    ) -> None:
        super().__init__(name, sft_weight=sft_weight)
        self.alpha = check_alpha(alpha)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The terms of annotated and of synthetic responses."""
        log_ratio = y_pred - y_true  # (batch, 2)
        alpha = keras.ops.cast(self.alpha, self.dtype)
        return [
            Risk(-log_ratio[:, 0], 1.0 - alpha),
            Risk(log_ratio[:, 1], alpha),
        ]

    def bind_alpha(self, variable: keras.Variable) -> None:
        """Makes `variable` the order; it takes the order's value."""
        if variable is not self.alpha:
            variable.assign(self.alpha)
            self.alpha = variable

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration, with the present order as a number."""
        return {"alpha": _number(self.alpha), **super().get_config()}


def check_alpha(alpha: Any) -> float | keras.Variable:
    """Returns an order if it is one: a number or a scalar variable.

    Raises:
        ValueError: It isn't, or not in [0, 100].
    """
    is_scalar = isinstance(alpha, numbers.Real) or (
        isinstance(alpha, keras.Variable) and tuple(alpha.shape) == ()
    )
    if not is_scalar or not 0 <= _number(alpha) <= 100:
        raise ValueError(
            "`alpha` has to be a number in [0, 100] or a scalar Keras "
            f"variable that holds one. Received: {alpha!r}. Orders from 0.5 "
            "to 2 are usual."
        )
    return alpha if isinstance(alpha, keras.Variable) else float(alpha)


def _number(alpha: float | keras.Variable) -> float:
    # A variable itself makes NumPy warn on JAX, and PyTorch if trainable.
    alpha = keras.ops.convert_to_tensor(alpha)
    return float(keras.ops.convert_to_numpy(alpha))
