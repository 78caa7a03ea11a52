"""Tilted risks of a batch that comes in parts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from keras import ops

from keras_iris.losses.risk import Risk

Tensor = Any


@dataclass(frozen=True)
class Stream:
    """A term of an objective whose batch comes in parts.

    The gradient of a tilted risk is the sum of `p exp(t f) grad f` over the
    batch, divided by the sum of `p exp(t f)`. Both sums can be taken part by
    part, as in an online softmax: exponents count from the largest so far,
    and where a part has a larger one, the sums of the parts before shrink.

    Attributes:
        columns: The responses that the term depends on: 0 for annotated, 1
            for synthetic, 2 for proto-synthetic.
        risk: Maps opponent and policy log-probs of shape
            `(part, len(columns))` to a `Risk`.

    Reference:
        Milakov and Gimelshein, "Online normalizer calculation for softmax",
        arXiv 1805.02867, for the sums.
    """

    columns: tuple[int, ...]
    risk: Callable[[Tensor, Tensor], Risk]

    # Below every exponent, and not infinite: differences stay numbers.
    first_shift: ClassVar[float] = -3e38

    def part_size(self, micro_batch_size: int, num_rows: int | None) -> int:
        """Rows of a part: twice as many where each is one response.

        Args:
            micro_batch_size: Pairs of a micro-batch.
            num_rows: Rows of the whole batch, where it is known.
        """
        size = micro_batch_size * (2 if len(self.columns) == 1 else 1)
        return min(size, num_rows or size)

    def objective(
        self, y_true: Tensor, y_pred: Tensor, p: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is differentiated for a part of the batch.

        Args:
            y_true: Opponent log-probs, shape `(part, len(columns))`, in nats.
            y_pred: Policy log-probs, of that shape, in nats.
            p: Share of each row in the sum of all sample weights, shape
                `(part,)`.
            shift: The largest exponent of the parts before, a scalar;
                `first_shift` where there is none.

        Returns:
            A scalar whose gradient in `y_pred` is that of the part's sum, the
            sum of the part's weights, and the new `shift`. Both sums of the
            parts before have to be multiplied by `exp(old - new shift)`. The
            gradient of the term is the quotient of the final sums.
        """
        p = ops.cast(p, "float32")
        is_row = p > 0
        # A NaN in a row that doesn't count would get into the gradient.
        y_true, y_pred = (
            ops.where(is_row[:, None], ops.cast(y, "float32"), 0.0)
            for y in (y_true, y_pred)
        )
        risk = self.risk(y_true, y_pred)
        exponents = ops.cast(risk.values, "float32") * risk.tilt
        exponents = ops.stop_gradient(ops.cast(exponents, "float32"))
        new_shift = ops.maximum(
            shift, ops.max(ops.where(is_row, exponents, self.first_shift))
        )
        weights = p * ops.exp(ops.where(is_row, exponents - new_shift, 0.0))
        objective = risk.weight * ops.sum(weights * risk.values)
        return objective, ops.sum(weights), new_shift


def flat_weights(sample_weight: Tensor, num_rows: int | None) -> Tensor:
    """Weights of the pairs as a tensor of shape `(batch,)`.

    Args:
        sample_weight: Array of shape `(batch,)` or `(batch, 1)`.
        num_rows: The batch size, where it is known.

    Raises:
        ValueError: The shape is another one.
    """
    sample_weight = ops.convert_to_tensor(sample_weight)
    if getattr(sample_weight.shape, "rank", 0) is None:
        # TensorFlow has traced both forms, and tells them apart no more.
        return ops.reshape(sample_weight, (-1,))
    shape = tuple(sample_weight.shape)
    is_flat = len(shape) in (1, 2) and shape[1:] in ((), (1,), (None,))
    if not is_flat or len({shape[0], num_rows} - {None}) > 1:
        raise ValueError(
            "`sample_weight` has to be of shape (batch,), one weight per "
            f"pair. Received: shape {shape} for {num_rows} pairs. Give both "
            "responses of a pair the same weight."
        )
    return ops.reshape(sample_weight, (-1,))


def shares(sample_weight: Tensor | None, y: Tensor) -> Tensor:
    """Each pair's share in the sum of all weights: see `flat_weights`.

    Args:
        sample_weight: `None` where all pairs weigh the same; negative ones
            count as 0.
        y: The opponent's log-probs, of shape `(batch, responses)`.

    Returns:
        Float32 tensor of shape `(batch,)`; zeros where all weights are zero.
    """
    if sample_weight is None:
        sample_weight = ops.ones(ops.shape(y)[:1])
    weights = ops.cast(flat_weights(sample_weight, y.shape[0]), "float32")
    weights = ops.relu(weights)
    total = ops.sum(weights)
    return weights / ops.where(total == 0, 1.0, total)
