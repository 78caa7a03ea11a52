"""The order of IRIS, and the base of metrics that depend on it."""

import abc
from typing import Any

import keras
from keras import ops

Tensor = Any


class AlphaMetric(keras.metrics.Metric, abc.ABC):
    """Base of metrics that depend on the order alpha.

    On JAX a metric sees no variables but its own. So it holds a copy of the
    order, which a reset leaves as it is. `SelfPlayModel` binds `model.alpha`
    when it is compiled, and has it copied for every batch.

    Args:
        alpha: The order: a number or a scalar Keras variable.
        name: Name of the metric.
        dtype: Type of the metric's variables.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        self.alpha = self.add_variable((), "ones", name="alpha")
        self.alpha.assign(alpha)
        if isinstance(alpha, keras.Variable):
            self.bind_alpha(alpha)

    def bind_alpha(self, variable: keras.Variable) -> None:
        """Makes `variable` the order.

        Args:
            variable: A scalar variable.
        """
        # In a function, where Keras doesn't track it: as a variable of both
        # model and metric it would be handed to JAX twice.
        self._bound_alpha = lambda: variable
        self.copy_alpha()

    def copy_alpha(self) -> None:
        """Takes over the present value of the bound variable, if any."""
        bound = getattr(self, "_bound_alpha", None)
        if bound is not None:
            self.alpha.assign(bound())

    def reset_state(self) -> None:
        """Forgets all batches, but not the order."""
        for variable in self.variables:
            if variable is not self.alpha:
                variable.assign(ops.zeros(variable.shape))

    def get_config(self) -> dict[str, Any]:
        """The metric's configuration, with the present order as a number."""
        alpha = float(ops.convert_to_numpy(self.alpha.value))
        return {**super().get_config(), "alpha": alpha}


class BatchAlphaMetric(AlphaMetric):
    """Base of metrics of a whole batch and the order, averaged over batches.

    Args:
        alpha: The order: a number or a scalar Keras variable.
        name: Name of the metric.
        dtype: Type of the metric's variables.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str,
        dtype: Any = None,
    ) -> None:
        super().__init__(alpha, name=name, dtype=dtype)
        self.total = self.add_variable((), "zeros", name="total")
        self.num_batches = self.add_variable((), "zeros", name="num_batches")

    @abc.abstractmethod
    def batch_value(
        self, log_ratio: Tensor, alpha: Tensor, sample_weight: Tensor
    ) -> Tensor:
        """The value for one batch.

        Args:
            log_ratio: Log-ratios, shape `(batch, 2)`, in nats.
            alpha: The order, a scalar.
            sample_weight: Weights of the pairs, shape `(batch,)`.

        Returns:
            A scalar.
        """

    def update_state(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Adds a batch; one whose weights are all 0 doesn't count.

        Args:
            y_true: Opponent log-probs, shape `(batch, 2)`, in nats.
            y_pred: Policy log-probs, shape `(batch, 2)`, in nats.
            sample_weight: Weights of the pairs, shape `(batch,)`.
        """
        log_ratio = ops.cast(y_pred, "float32") - ops.cast(y_true, "float32")
        if sample_weight is None:
            weight = ops.ones_like(log_ratio[:, 0])
        else:
            weight = ops.reshape(ops.cast(sample_weight, "float32"), (-1,))
        alpha = ops.cast(self.alpha, "float32")
        value = self.batch_value(log_ratio, alpha, weight)
        is_batch = ops.any(weight > 0)
        self.total.assign_add(ops.where(is_batch, value, 0.0))
        self.num_batches.assign_add(ops.cast(is_batch, self.dtype))

    def result(self) -> Tensor:
        """The mean over batches."""
        return ops.divide_no_nan(self.total, self.num_batches)


@keras.saving.register_keras_serializable(package="keras_iris")
class Alpha(AlphaMetric):
    """The order alpha as it stood at the latest batch.

    Args:
        alpha: The order: a number or a scalar Keras variable.
        name: Name of the metric.
        dtype: Type of the metric's variables.
    """

    def __init__(
        self,
        alpha: float | keras.Variable = 1.0,
        *,
        name: str = "alpha",
        dtype: Any = None,
    ) -> None:
        super().__init__(alpha, name=name, dtype=dtype)

    def update_state(
        self,
        y_true: Tensor,
        y_pred: Tensor,
        sample_weight: Tensor | None = None,
    ) -> None:
        """Adds nothing: the order doesn't depend on the batch."""

    def result(self) -> Tensor:
        """The order."""
        return ops.convert_to_tensor(self.alpha)
