"""What every self-play objective is: a sum of tilted risks."""

import abc
import functools
from typing import Any

import keras
from keras import ops

from keras_iris.arguments import check_between
from keras_iris.losses.risk import Risk, tilted_risk
from keras_iris.losses.stream import Stream, flat_weights

Tensor = Any


class SelfPlayLoss(keras.losses.Loss, abc.ABC):
    """Base of self-play objectives.

    A subclass lists its terms in `risks`, and an anchor may be added to them:
    supervised fine-tuning, `sft_weight` times the mean of `-log p_policy(y)`
    over annotated responses. The loss is a number for the whole batch, computed
    in float32 (float64 where that is Keras' float type) whatever the dtype
    policy.

    Call arguments:
        y_true: Opponent log-probs, shape `(batch, 2)`: annotated and
            synthetic response, in nats.
        y_pred: Policy log-probs, shape `(batch, 2)`, in nats.
        sample_weight: Weights of the pairs, shape `(batch,)` or `(batch, 1)`,
            normalised to sum to 1; None for equal weights.

    Args:
        name: Name of the loss; that of its class where there is none.
        sft_weight: Weight of the anchor, in [0, 1000]; 0 for none. The NLL is
            that of whole responses, in nats, as log-ratios are.

    Raises:
        ValueError: `sft_weight` is out of range.
    """

    # Whether the first risk depends on annotated and the second on synthetic
    # responses alone: then micro-batches need not hold pairs.
    is_separable = False
    # Whether synthetic responses matter; if not, a control draws none.
    uses_synthetic = True

    def __init__(
        self, name: str | None = None, *, sft_weight: float = 0.0
    ) -> None:
        is_wide = keras.config.floatx() == "float64"
        dtype = "float64" if is_wide else "float32"
        super().__init__(name=name, dtype=dtype)
        self.sft_weight = check_between("sft_weight", sft_weight, 0, 1000)

    @abc.abstractmethod
    def risks(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The terms of the objective.

        Args:
            y_true: Opponent log-probs, shape `(batch, 2)`, in nats.
            y_pred: Policy log-probs, shape `(batch, 2)`, in nats.

        Returns:
            A list of `Risk`.
        """

    def streams(self) -> list[Stream]:
        """The terms whose gradients add up to that of the loss.

        Each takes one pass over the responses that it depends on: one for
        all where tilts are 0, as means add up, else one for each term.
        """
        zeros = ops.zeros((1, 2), self.dtype)
        risks = self.risks(zeros, zeros)
        if all(isinstance(r.tilt, int | float) and r.tilt == 0 for r in risks):
            return [Stream((0, 1), self._mean_risk)]
        anchors = [Stream((0,), self._anchor)] if self.sft_weight else []
        if self.is_separable:
            return [
                Stream((column,), functools.partial(self._column_risk, column))
                for column in range(len(risks))
            ] + anchors
        return [
            Stream((0, 1), functools.partial(self._nth_risk, number))
            for number in range(len(risks))
        ] + anchors

    def _terms(self, y_true: Tensor, y_pred: Tensor) -> list[Risk]:
        """The risks, and the anchor where there is one."""
        anchors = [self._anchor(y_true, y_pred)] if self.sft_weight else []
        return [*self.risks(y_true, y_pred), *anchors]

    def _anchor(self, y_true: Tensor, y_pred: Tensor) -> Risk:
        """Supervised fine-tuning; column 0 may be the only one."""
        del y_true
        return Risk(-y_pred[:, 0], weight=self.sft_weight)

    def _mean_risk(self, y_true: Tensor, y_pred: Tensor) -> Risk:
        """All terms in one, where their tilts are 0."""
        risks = self._terms(y_true, y_pred)
        return Risk(sum(risk.weight * risk.values for risk in risks))

    def _nth_risk(self, number: int, y_true: Tensor, y_pred: Tensor) -> Risk:
        return self.risks(y_true, y_pred)[number]

    def _column_risk(self, column: int, y_true: Tensor, y_pred: Tensor) -> Risk:
        """A risk from the one column, `(batch, 1)`, that it depends on."""
        pairs = (ops.repeat(y, 2, axis=1) for y in (y_true, y_pred))
        return self.risks(*pairs)[column]

    def bind_alpha(self, variable: keras.Variable) -> None:
        """Makes `variable` the order of the loss, where it has one.

        Args:
            variable: A scalar variable, which takes the order's value.
        """
        del variable

    def __copy__(self) -> "SelfPlayLoss":
        # Keras (3.15) copies by serialising, for which the class of a user's
        # own loss would have to be registered.
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        return copy

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of a batch of equal weights, a scalar."""
        return self(y_true, y_pred)

    def __call__(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a scalar."""
        if y_true is None:
            raise ValueError(
                "The opponent's log-probs of shape (batch, 2) are missing. "
                "Pass them as `y`: `opponent = model.predict(inputs)`, then "
                "`model.fit(inputs, opponent)`."
            )
        y_true = ops.cast(ops.convert_to_tensor(y_true), self.dtype)
        y_pred = ops.cast(ops.convert_to_tensor(y_pred), self.dtype)
        _check_shapes(y_true, y_pred)
        if sample_weight is not None:
            sample_weight = flat_weights(sample_weight, y_pred.shape[0])
            sample_weight = ops.cast(sample_weight, self.dtype)
            # A NaN in a row that doesn't count would get into the gradient.
            is_row = sample_weight[:, None] > 0
            y_true = ops.where(is_row, y_true, 0.0)
            y_pred = ops.where(is_row, y_pred, 0.0)
        return sum(
            risk.weight * tilted_risk(risk.values, risk.tilt, sample_weight)
            for risk in self._terms(y_true, y_pred)
        )

    def get_config(self) -> dict[str, Any]:
        """The loss's configuration."""
        return {"name": self.name, "sft_weight": self.sft_weight}


def _check_shapes(y_true: Tensor, y_pred: Tensor) -> None:
    true, pred = tuple(y_true.shape), tuple(y_pred.shape)
    is_pair = all(len(s) == 2 and s[1] in (2, None) for s in (true, pred))
    # TensorFlow may not know the batch size when it traces.
    if not is_pair or len({true[0], pred[0]} - {None}) > 1:
        raise ValueError(
            "Log-probs have to be of one shape (batch, 2): annotated and "
            f"synthetic response. Received: y_true of shape {true}, y_pred of "
            f"shape {pred}. `model.predict(pairs)` gives them in that shape."
        )
