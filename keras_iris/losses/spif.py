"""SPIF."""

from typing import Any

import keras

from keras_iris.arguments import check_positive
from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class SPIF(SelfPlayLoss):
    """Squared distances of bounded rewards: chi-squared self-play.

    The loss is `(r(y) - 1/c)^2 + (r(y') + 1/c)^2`. The paper's exact form was
    not at hand: this completes the square of
    `E r(y) - E r(y') - (c/2) (E r(y)^2 + E r(y')^2)`.

    Args:
        c: Strength of the regularisation, positive.
        sft_weight: Weight of the anchor, see `SelfPlayLoss`.
        name: Name of the loss.

    Raises:
        ValueError: `c` isn't positive, or `sft_weight` is out of range.

    Reference:
        SPIF, arXiv 2602.01357.
    """

    def __init__(
        self,
        c: float = 1.0,
        *,
        sft_weight: float = 0.0,
        name: str = "spif",
    ) -> None:
        super().__init__(name, sft_weight=sft_weight)
        self.c = check_positive("c", c)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The terms of annotated and of synthetic responses."""
        log_ratio = y_pred - y_true  # (batch, 2)
        return [
            Risk(keras.ops.square(log_ratio[:, 0] - 1.0 / self.c)),
            Risk(keras.ops.square(log_ratio[:, 1] + 1.0 / self.c)),
        ]

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration."""
        return {"c": self.c, **super().get_config()}
