"""What metrics are made from: the log-probs of a batch of pairs."""

from typing import Any, NamedTuple

from keras import ops

from keras_iris.losses.stream import flat_weights

Tensor = Any


class PairBatch(NamedTuple):
    """How a batch of pairs came out, in NumPy or in tensors.

    Attributes:
        opponent: Opponent log-probs, shape `(batch, 2)`, in nats.
        policy: Policy log-probs, shape `(batch, 2)`, in nats.
        num_tokens: Response tokens, shape `(batch, 2)`.
        sample_weight: Weights, shape `(batch,)`.
        alpha: The order, a scalar.
        gap: The latest estimate of the gap, a scalar, in nats.
        num_samples: How many pairs each annotated response is in, a scalar.
        gradient_norm: Of the step, a scalar; see `metrics.GradientNorm`.
    """

    opponent: Tensor
    policy: Tensor
    num_tokens: Tensor
    sample_weight: Tensor
    alpha: Tensor = 1.0
    gap: Tensor = 0.0
    num_samples: Tensor = 1
    gradient_norm: Tensor = 0.0

    @property
    def log_ratio(self) -> Tensor:
        """Policy minus opponent log-probs, shape `(batch, 2)`, in nats."""
        return self.policy - self.opponent

    def to_tensors(self) -> "PairBatch":
        """The batch in float32 tensors; rows of weight 0 hold zeros."""
        opponent, policy, num_tokens, weight, *scalars = (
            ops.cast(ops.convert_to_tensor(field), "float32") for field in self
        )
        weight = flat_weights(weight, policy.shape[0])
        is_row = weight[:, None] > 0
        # Whose own values may be anything, NaN included.
        rows = [ops.where(is_row, a, 0.0) for a in (opponent, policy)]
        return PairBatch(rows[0], rows[1], num_tokens, weight, *scalars)
