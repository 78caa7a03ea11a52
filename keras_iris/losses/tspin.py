"""T-SPIN."""

from typing import Any

import keras

from keras_iris.arguments import check_between, check_positive
from keras_iris.losses.risk import Risk
from keras_iris.losses.self_play_loss import SelfPlayLoss

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class TSPIN(SelfPlayLoss):
    """Logistic losses of two margins in log-probs, without an opponent.

        -log sigmoid(beta (l(y) - l(y')))
            - proto_weight * log sigmoid(beta (l(y') - l(y0)))

    with the policy's log-probs `l` of the annotated response `y`, the
    synthetic `y'`, and the proto-synthetic `y0`, which the first policy, from
    before the first iteration, has given to the prompt. In the first iteration
    `y'` is such a response itself, and the first term is all there is: the
    loss then takes two columns, later three.

    Args:
        beta: Scale of the margins, positive; 1 as in the paper.
        proto_weight: Weight of the second term, in [0, 1000]; 0.1 as in the
            paper.
        sft_weight: Weight of the anchor, see `SelfPlayLoss`.
        name: Name of the loss.

    Raises:
        ValueError: `beta` isn't positive, or a weight is out of range.

    Examples:
        >>> loss = TSPIN()
        >>> policy = [[-3.0, -3.0, -3.0]]
        >>> round(float(loss(policy, policy)), 4)
        0.7625

    Reference:
        T-SPIN, arXiv 2601.08198.
    """

    max_responses = 3

    def __init__(
        self,
        beta: float = 1.0,
        proto_weight: float = 0.1,
        *,
        sft_weight: float = 0.0,
        name: str = "tspin",
    ) -> None:
        super().__init__(name, sft_weight=sft_weight)
        self.beta = check_positive("beta", beta)
        self.proto_weight = check_between("proto_weight", proto_weight, 0, 1000)

    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """A term for each margin; the opponent's log-probs don't matter."""
        del y_true
        margins = y_pred[:, :-1] - y_pred[:, 1:]  # (batch, 1 or 2)
        losses = keras.ops.softplus(-self.beta * margins)
        weights = (1.0, self.proto_weight)[: y_pred.shape[1] - 1]
        return [Risk(losses[:, i], weight=w) for i, w in enumerate(weights)]

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration."""
        return {
            "beta": self.beta,
            "proto_weight": self.proto_weight,
            **super().get_config(),
        }
