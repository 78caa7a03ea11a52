"""SPIN."""

from typing import Any

import keras

from keras_iris.arguments import check_positive
from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class SPIN(SelfPlayLoss):
    """Logistic loss of the margin: `-log sigmoid(beta (r(y) - r(y')))`.

    Args:
        beta: Scale of the log-ratios, positive; 0.1 as in the paper's code.
        sft_weight: Weight of the anchor, see `SelfPlayLoss`.
        name: Name of the loss.

    Raises:
        ValueError: `beta` isn't positive, or `sft_weight` is out of range.

    Reference:
        SPIN, arXiv 2401.01335, equation 4.7.
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        sft_weight: float = 0.0,
        name: str = "spin",
    ) -> None:
        super().__init__(name, sft_weight=sft_weight)
        self.beta = check_positive("beta", beta)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The one term."""
        log_ratio = y_pred - y_true  # (batch, 2)
        margin = log_ratio[:, 0] - log_ratio[:, 1]
        return [Risk(keras.ops.softplus(-self.beta * margin))]

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration."""
        return {"beta": self.beta, **super().get_config()}
