"""The base of all metrics of pairs."""

import abc
from typing import Any, ClassVar

import keras
from keras import ops

from keras_iris.metrics.pair_batch import PairBatch

Tensor = Any


class PairMetric(keras.metrics.Metric, abc.ABC):
    """A quotient of two sums over batches of pairs.

    A subclass gives numerator and denominator of one batch. The value of an
    epoch is the quotient of their sums, that of a batch their quotient; 0
    where the denominator is. `SelfPlayModel` hands each batch to the metrics
    it is compiled with.

    Args:
        name: Name of the metric; that of its class where there is none.
        dtype: Type of the metric's variables.
    """

    default_name: ClassVar[str]
    shape: ClassVar[tuple[int, ...]] = ()  # of numerator and denominator

    def __init__(self, name: str | None = None, dtype: Any = None) -> None:
        super().__init__(name=name or self.default_name, dtype=dtype)
        # In one variable: of a denominator alone that is always 1, XLA (seen
        # with JAX 0.11 on an H200) made another one's value.
        self.sums = self.add_variable((2, *self.shape), "zeros", name="sums")

    @abc.abstractmethod
    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of one batch.

        Args:
            batch: In float32 tensors, with zeros in rows of weight 0.

        Returns:
            Two tensors of the metric's `shape`.
        """

    def quotient(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """The value, a scalar."""
        return ops.divide_no_nan(numerator, denominator)

    def value(self, batch: PairBatch) -> Tensor:
        """The value of one batch in float32 tensors, a scalar."""
        return self.quotient(*self.terms(batch))

    def update_state(self, batch: PairBatch) -> None:
        """Adds a batch in float32 tensors."""
        self.sums.assign_add(ops.cast(ops.stack(self.terms(batch)), self.dtype))

    def result(self) -> Tensor:
        """The value over all batches, a scalar."""
        sums = ops.convert_to_tensor(self.sums)
        return self.quotient(sums[0], sums[1])


class BatchMetric(PairMetric):
    """A value of a whole batch, averaged over batches.

    A batch whose weights are all 0 doesn't count.
    """

    @abc.abstractmethod
    def batch_value(self, batch: PairBatch) -> Tensor:
        """The value for one batch, a scalar."""

    def terms(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The value, and 1."""
        is_batch = ops.any(batch.sample_weight > 0)
        value = ops.where(is_batch, self.batch_value(batch), 0.0)
        return value, ops.cast(is_batch, "float32")
