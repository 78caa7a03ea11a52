"""What a run is judged by, in the logs and batch by batch."""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_iris.metrics.divergence import Divergence
from keras_iris.metrics.effective_sample_size import (
    RealEffectiveSampleSize,
    SyntheticEffectiveSampleSize,
)
from keras_iris.metrics.log_ratios import (
    Margin,
    MarginAccuracy,
    RealLogRatio,
    SyntheticLogRatio,
)
from keras_iris.metrics.nll import NLLGap, RealNLL, SyntheticNLL
from keras_iris.metrics.pair_batch import PairBatch
from keras_iris.metrics.pair_metric import PairMetric
from keras_iris.metrics.step import Alpha, Gap, GradientNorm


def self_play_metrics() -> list[PairMetric]:
    """A new instance of every metric.

    Returns:
        A list, for the argument `metrics` of `SelfPlayModel.compile`.
    """
    return [
        Alpha(),
        Gap(),
        GradientNorm(),
        Margin(),
        MarginAccuracy(),
        RealEffectiveSampleSize(),
        SyntheticEffectiveSampleSize(),
        RealLogRatio(),
        SyntheticLogRatio(),
        RealNLL(),
        SyntheticNLL(),
        NLLGap(),
        Divergence(),
    ]


def step_values(batch: PairBatch) -> dict[str, float]:
    """The values of all metrics for one batch, on the host.

    Args:
        batch: The batch, such as `model.recent.latest()`.

    Returns:
        Values by the names of the metrics.
    """
    fields = {
        name: np.asarray(field, "float32")
        for name, field in batch._asdict().items()
    }
    model = _step_values()
    names = [metric.name for metric in model.parts]
    values = np.asarray(model.predict_on_batch(fields))
    return dict(zip(names, values.tolist(), strict=True))


class _StepValues(keras.Model):
    """Compiles the values of a batch, which one by one take long."""

    def __init__(self) -> None:
        super().__init__(name="step_values")
        self.parts = self_play_metrics()
        self.built = True

    def call(self, fields: dict[str, Any]) -> Any:
        """All values, in one tensor."""
        batch = PairBatch(**fields).to_tensors()
        return ops.stack([metric.value(batch) for metric in self.parts])


_step_values = functools.cache(_StepValues)
