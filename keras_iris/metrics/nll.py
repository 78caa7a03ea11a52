"""Negative log-likelihoods per token under the policy, in nats."""

import abc
from typing import Any

import keras
from keras import ops

Tensor = Any


class TokenMetric(keras.metrics.Metric, abc.ABC):
    """Base of metrics that need the number of response tokens.

    `SelfPlayModel` calls `update_state(num_tokens, y_pred, sample_weight)`:
    response tokens, and policy log-probs in nats, both of shape `(batch, 2)`.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str, dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)
        self.nats = self.add_variable((2,), "zeros", name="nats")
        self.tokens = self.add_variable((2,), "zeros", name="tokens")

    def update_state(
        self, num_tokens: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> None:
        """Adds a batch."""
        nats = -ops.cast(y_pred, "float32")
        tokens = ops.cast(num_tokens, "float32")
        if sample_weight is not None:
            weight = ops.cast(ops.reshape(sample_weight, (-1, 1)), "float32")
            # `where`: a row of weight 0 may hold a NaN.
            nats = ops.where(weight > 0, weight * nats, 0.0)
            tokens = weight * tokens
        self.nats.assign_add(ops.sum(nats, axis=0))
        self.tokens.assign_add(ops.sum(tokens, axis=0))

    def nll(self) -> Tensor:
        """NLL per token of annotated and synthetic responses, shape (2,)."""
        tokens = ops.convert_to_tensor(self.tokens)
        return self.nats / ops.where(tokens > 0, tokens, 1.0)

    @abc.abstractmethod
    def result(self) -> Tensor:
        """The metric's value."""


@keras.saving.register_keras_serializable(package="keras_iris")
class RealNLL(TokenMetric):
    """NLL per token of annotated responses, in nats.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "real_nll", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def result(self) -> Tensor:
        """The metric's value."""
        return self.nll()[0]


@keras.saving.register_keras_serializable(package="keras_iris")
class SyntheticNLL(TokenMetric):
    """NLL per token of synthetic responses, in nats.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "synthetic_nll", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def result(self) -> Tensor:
        """The metric's value."""
        return self.nll()[1]


@keras.saving.register_keras_serializable(package="keras_iris")
class Gap(TokenMetric):
    """NLL per token of annotated minus that of synthetic responses, in nats.

    0 where the policy finds the data as likely as its own samples.

    Args:
        name: Name of the metric.
        dtype: As in `keras.metrics.Metric`.
    """

    def __init__(self, name: str = "gap", dtype: Any = None) -> None:
        super().__init__(name=name, dtype=dtype)

    def result(self) -> Tensor:
        """The metric's value."""
        nll = self.nll()
        return nll[0] - nll[1]
