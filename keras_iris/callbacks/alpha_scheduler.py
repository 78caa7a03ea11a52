"""The adaptive order of IRIS."""

import numbers
import warnings
from typing import Any

import keras
import numpy as np

from keras_iris.arguments import check_count
from keras_iris.callbacks.gap_estimators import GapEstimator, TokenGap
from keras_iris.metrics import PairBatch, effective_sample_size


class AlphaScheduler(keras.callbacks.Callback):
    """Lets the order alpha follow the gap between model and data.

    A large gap gives a large order (sharp weights, early), a small gap a
    smaller one (smooth refinement, near convergence):

        alpha = min_alpha + (max_alpha - min_alpha) * clip(gap / gap_0, 0, 1)

    where `gap` is an exponential moving average over batches and `gap_0` its
    first value. Then a guard lowers alpha, below `min_alpha` if it must, to
    the largest order at which the importance weights of annotated and of
    synthetic responses both keep an effective sample size of
    `min_effective_sample_size` of the batch. Where no order does, it takes
    the one whose smaller effective sample size is largest.

    The moving average and `gap_0` are variables of the model: they are saved
    with its weights, and carry over from one `fit` to the next. The first
    batch of all has the order that the loss was compiled with. A batch whose
    gap isn't finite leaves alpha as it is. Where the first gap isn't positive,
    as on data that the model has memorised, a warning says so, alpha stays at
    `min_alpha`, and `gap_0` is the first value that is.

    Args:
        min_alpha: Order where the gap has closed.
        max_alpha: Order at the first gap.
        gap_estimator: A `GapEstimator`; `TokenGap()` by default.
        smoothing: Weight of the past in the moving average, in [0, 1), per
            batch.
        min_effective_sample_size: Share of the batch, in [0, 1]; 0 turns the
            guard off.
        update_every_batches: Batches between two changes of alpha, each from
            the latest batch.

    Raises:
        ValueError: An argument is out of its range.

    Reference:
        IRIS, arXiv 2604.20933. The guard is a finding of this package:
        uncapped orders above 1 lock small batches onto single examples.
    """

    def __init__(  # noqa: PLR0913 (all but the first two by keyword only)
        self,
        min_alpha: float = 0.5,
        max_alpha: float = 2.0,
        *,
        gap_estimator: GapEstimator | None = None,
        smoothing: float = 0.95,
        min_effective_sample_size: float = 0.5,
        update_every_batches: int = 1,
    ) -> None:
        super().__init__()
        for name, value in (
            ("min_alpha", min_alpha),
            ("max_alpha", max_alpha),
            ("smoothing", smoothing),
            ("min_effective_sample_size", min_effective_sample_size),
        ):
            if not isinstance(value, numbers.Real):
                raise ValueError(
                    f"`{name}` has to be a number. Received: {value!r}"
                )
        if not 0 <= min_alpha <= max_alpha <= 100:
            raise ValueError(
                "Orders have to satisfy 0 <= min_alpha <= max_alpha <= 100. "
                f"Received: min_alpha={min_alpha}, max_alpha={max_alpha}"
            )
        if not 0 <= smoothing < 1:
            raise ValueError(
                f"`smoothing` has to be in [0, 1). Received: {smoothing}"
            )
        if not 0 <= min_effective_sample_size <= 1:
            raise ValueError(
                "`min_effective_sample_size` is a share of the batch, in "
                f"[0, 1]. Received: {min_effective_sample_size}"
            )
        check_count("update_every_batches", update_every_batches)
        gap_estimator = TokenGap() if gap_estimator is None else gap_estimator
        if isinstance(gap_estimator, type) or not isinstance(
            gap_estimator, GapEstimator
        ):
            raise ValueError(
                "`gap_estimator` has to be an object that is called with a "
                "batch and alpha and has `starts_at_zero`, such as "
                "`keras_iris.callbacks.MarginGap()`. Received: "
                f"{gap_estimator!r}"
            )
        self.min_alpha = min_alpha
        self.max_alpha = max_alpha
        self.gap_estimator = gap_estimator
        self.smoothing = smoothing
        self.min_effective_sample_size = min_effective_sample_size
        self.update_every_batches = update_every_batches
        self._num_batches = 0
        self._last_batch = -1

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes up the count of batches where an earlier `fit` left it."""
        self._num_batches = int(self.model.optimizer.iterations.value)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Batches count from 0 again."""
        self._last_batch = -1

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Sets the order for the batches to come."""
        before = self._num_batches // self.update_every_batches
        # Several at once where Keras executes several steps.
        self._num_batches += batch - self._last_batch
        self._last_batch = batch
        if self._num_batches // self.update_every_batches == before:
            return
        model = self.model  # fetches the state from the device: only here
        latest = model.recent.latest()
        if not len(latest.sample_weight):
            return  # all of weight 0
        alpha = float(keras.ops.convert_to_numpy(model.alpha.value))
        gap = self.gap_estimator(latest, alpha)
        if not np.isfinite(gap):
            return  # the order stays; the loop of self-play stops by itself
        state = keras.ops.convert_to_numpy(model.gap_state.value)
        state = self._smooth(state, gap)
        model.gap_state.assign(state)
        model.alpha.assign(self._capped(self._order(state), latest))

    def _smooth(self, state: np.ndarray, gap: float) -> np.ndarray:
        """Advances (moving average, weight of its zero start, reference)."""
        average, start, reference = (float(value) for value in state)
        average = self.smoothing * average + (1 - self.smoothing) * gap
        start *= self.smoothing
        smoothed = average / (1 - start)
        if self.gap_estimator.starts_at_zero:
            reference = max(reference, smoothed)
        elif reference <= 0.0:
            if smoothed <= 0 and state[1] == 1.0:
                warnings.warn(
                    f"The first gap is {smoothed:.3g}, not positive: alpha "
                    f"stays at min_alpha={self.min_alpha} until one is. The "
                    "model finds its own samples less likely than the "
                    "annotated responses; `gap_estimator=DivergenceGap()` "
                    "doesn't depend on that.",
                    stacklevel=2,
                )
            reference = max(smoothed, 0.0)
        return np.array([average, start, reference], "float32")

    def _order(self, state: np.ndarray) -> float:
        average, start, reference = (float(value) for value in state)
        smoothed = average / (1 - start)
        relative = smoothed / reference if reference > 0 else 0.0
        span = self.max_alpha - self.min_alpha
        return self.min_alpha + span * float(np.clip(relative, 0, 1))

    def _capped(self, alpha: float, batch: PairBatch) -> float:
        """The largest order up to `alpha` that keeps enough examples."""
        real, synthetic = batch.log_ratio.T
        weight = batch.sample_weight
        orders = np.linspace(alpha, 0.0, 101)
        sizes = np.array(
            [
                min(
                    effective_sample_size(real, order - 1, weight),
                    effective_sample_size(synthetic, order, weight),
                )
                for order in orders
            ]
        )
        enough = np.flatnonzero(sizes >= self.min_effective_sample_size)
        best = enough[0] if len(enough) else np.argmax(sizes)
        return float(orders[best])
