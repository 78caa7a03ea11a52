"""Supervised fine-tuning, the control."""

from typing import Any

import keras

from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class SFT(SelfPlayLoss):
    """`-log p_policy(y)` of annotated responses, summed over their tokens.

    It ignores the opponent and the synthetic responses.

    Args:
        name: Name of the loss.
    """

    uses_synthetic = False

    def __init__(self, *, name: str = "sft") -> None:
        super().__init__(name=name)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The one term."""
        del y_true
        return [Risk(-y_pred[:, 0])]

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration; it needs no anchor."""
        return {"name": self.name}
