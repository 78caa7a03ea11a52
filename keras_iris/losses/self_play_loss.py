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
            synthetic response, in nats. A loss whose `max_responses` is 3
            also takes `(batch, 3)`, with the proto-synthetic response, the
            first policy's.
        y_pred: Policy log-probs of the same shape, in nats.
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
    # 3 where the response of the first policy matters as well.
    max_responses = 2

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
            y_true: Opponent log-probs, shape `(batch, 2)` or, where
                `max_responses` is 3, `(batch, 3)`, in nats.
            y_pred: Policy log-probs, of the same shape, in nats.

        Returns:
            A list of `Risk`.
        """

    def streams(self, y_true: Tensor, y_pred: Tensor) -> list[Stream]:
        """The terms whose gradients add up to that of the loss.

        Each takes one pass over the responses that it depends on: one for
        all where tilts are 0, as means add up, else one for each term.

        Args:
            y_true: Opponent log-probs, of which the shape is read.
            y_pred: Policy log-probs, or any tensor of their shape.

        Raises:
            ValueError: As of `check_shapes`, or TensorFlow has traced the
                step for any number of responses.
        """
        self.check_shapes(y_true, y_pred)
        num_responses = y_true.shape[1]
        if num_responses is None:
            raise ValueError(
                "The step was traced for several numbers of responses. Pass "
                "a `PairDataset`, or set `model.train_function = None` before "
                "a `fit` with another number."
            )
        columns = tuple(range(num_responses))
        zeros = ops.zeros((1, num_responses), self.dtype)
        risks = self.risks(zeros, zeros)
        if all(isinstance(r.tilt, int | float) and r.tilt == 0 for r in risks):
            return [Stream(columns, self._mean_risk)]
        anchors = [Stream((0,), self._anchor)] if self.sft_weight else []
        if self.is_separable:
            return [
                Stream((column,), functools.partial(self._column_risk, column))
                for column in range(len(risks))
            ] + anchors
        return [
            Stream(columns, functools.partial(self._nth_risk, number))
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

    @property
    def has_order(self) -> bool:
        """Whether `bind_alpha` changes the loss."""
        return type(self).bind_alpha is not SelfPlayLoss.bind_alpha

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
        self.check_shapes(y_true, y_pred)
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

    def check_shapes(self, y_true: Tensor, y_pred: Tensor) -> None:
        """Refuses log-probs of shapes that the loss doesn't take.

        Args:
            y_true: Opponent log-probs, or any tensor of their shape.
            y_pred: Policy log-probs, likewise.

        Raises:
            ValueError: The shapes differ, or aren't `(batch, 2)` or, where
                `max_responses` is 3, `(batch, 3)`.
        """
        true, pred = tuple(y_true.shape), tuple(y_pred.shape)
        allowed = (*range(2, self.max_responses + 1), None)
        is_pair = all(len(s) == 2 and s[1] in allowed for s in (true, pred))
        # TensorFlow may not know the batch size when it traces.
        sizes = [{a, b} - {None} for a, b in zip(true, pred, strict=False)]
        if not is_pair or any(len(size) > 1 for size in sizes):
            shapes = "(batch, 2): annotated and synthetic response"
            if self.max_responses > 2:
                shapes += "; or (batch, 3): proto-synthetic response as well"
            raise ValueError(
                f"Log-probs have to be of one shape {shapes}. Received: "
                f"y_true of shape {true}, y_pred of shape {pred}. "
                "`model.predict(pairs)` gives them in that shape."
            )
