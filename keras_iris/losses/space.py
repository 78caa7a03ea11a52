"""SPACE."""

import math
from typing import Any

import keras

from keras_iris.arguments import check_positive
from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class SPACE(SelfPlayLoss):
    """Noise-contrastive estimation: is a response annotated or synthetic?

    With `s(z) = 1 / (1 + mu e^-z)` the loss is
    `-log s(r(y)) - mu log(1 - s(r(y')))`.

    Args:
        mu: Ratio of synthetic to annotated responses, positive.
        sft_weight: Weight of the anchor, see `SelfPlayLoss`.
        name: Name of the loss.

    Raises:
        ValueError: `mu` isn't positive, or `sft_weight` is out of range.

    Reference:
        SPACE, arXiv 2512.07175.
    """

    def __init__(
        self,
        mu: float = 1.0,
        *,
        sft_weight: float = 0.0,
        name: str = "space",
    ) -> None:
        super().__init__(name, sft_weight=sft_weight)
        self.mu = check_positive("mu", mu)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The terms of annotated and of synthetic responses."""
        # s(z) = sigmoid(z - log mu)
        logits = y_pred - y_true - math.log(self.mu)  # (batch, 2)
        return [
            Risk(keras.ops.softplus(-logits[:, 0])),
            Risk(keras.ops.softplus(logits[:, 1]), weight=self.mu),
        ]

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration."""
        return {"mu": self.mu, **super().get_config()}
