"""The adaptive order of IRIS."""

from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_iris.arguments import check_between
from keras_iris.callbacks.alpha_schedule import warn_without_order
from keras_iris.callbacks.gap import (
    GapEstimator,
    RenyiGap,
    add_moments,
    gap_of_moments,
    pair_moments,
)
from keras_iris.callbacks.self_play_callback import Logs, SelfPlayCallback
from keras_iris.metrics import PairBatch, effective_sample_size

Tensor = Any

# By `SelfPlay` before each `fit`; not yet known; a mean over the batches so
# far; of the first epoch.
_GapIs = Literal["given", "unknown", "streamed", "final"]


class AlphaScheduler(SelfPlayCallback):
    """Lets the order alpha follow the gap between model and data.

    A large gap gives a large order (sharp weights, early), a small gap a
    smaller one (smooth refinement, near convergence):

        alpha = clip(1 + coefficient * gap, min_alpha, max_alpha)

    Then a guard lowers alpha, below `min_alpha` if it must, to the largest
    order at which the importance weights of annotated and of synthetic
    responses of the latest batch both keep an effective sample size of
    `min_effective_sample_size` of the batch. Where no order does, it takes
    the one whose smaller effective sample size is largest. Of two pairs there
    always is a half: the guard is for larger batches.

    In `SelfPlay` the gap is one number an iteration, from all its pairs,
    before the first step. In plain `fit` it is that of the pairs seen so far;
    it is final after the first epoch, and the first batch of all has the order
    that the loss was compiled with. The gap is in `model.gap` and what it was
    made from in `model.gap_sums`: both are saved with the weights, so a resumed
    `fit` goes on with the same orders. A `fit` from epoch 0 starts anew, with
    that first order and no gap.

    Args:
        coefficient: How much alpha rises for a nat of gap, in [0, 1000]; the
            paper's are from 0.1 to 1.
        min_alpha: The smallest order of the rule, in [0, max_alpha].
        max_alpha: The largest order of the rule, in [0, 100].
        min_effective_sample_size: Share of the batch, in [0, 1]; 0 turns the
            guard off.
        gap: A `GapEstimator`, an object with a method `gap(pairs)` that
            returns nats; by default a `RenyiGap`. In plain `fit` the gap of
            another one is its mean over the batches so far.

    Raises:
        ValueError: An argument is out of its range.

    Examples:
        ```python
        model.compile(optimizer="adam", loss=keras_iris.losses.IRIS())
        model.fit(pairs, shuffle=False, callbacks=[AlphaScheduler()])
        ```

    Reference:
        IRIS, arXiv 2604.20933, equation 9, for the rule and its bounds. The
        paper's estimate of the gap was not at hand: `RenyiGap` is this
        package's. The guard is, too: uncapped orders above 1 lock small
        batches onto single examples.
    """

    def __init__(
        self,
        coefficient: float = 0.5,
        *,
        min_alpha: float = 0.5,
        max_alpha: float = 3.0,
        min_effective_sample_size: float = 0.5,
        gap: GapEstimator | None = None,
    ) -> None:
        super().__init__()
        gap = RenyiGap() if gap is None else gap
        if isinstance(gap, type) or not isinstance(gap, GapEstimator):
            raise ValueError(
                "`gap` has to be an object with a method `gap(pairs)` that "
                "returns nats, such as `keras_iris.callbacks.RenyiGap()`. "
                f"Received: {gap!r}"
            )
        self.coefficient = check_between("coefficient", coefficient, 0, 1000)
        self.max_alpha = check_between("max_alpha", max_alpha, 0, 100)
        self.min_alpha = check_between("min_alpha", min_alpha, 0, max_alpha)
        self.min_effective_sample_size = check_between(
            "min_effective_sample_size", min_effective_sample_size, 0, 1
        )
        self.gap = gap
        self._gap_is: _GapIs = "unknown"
        self._num_seen = 0

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        names = "coefficient min_alpha max_alpha min_effective_sample_size gap"
        return {name: getattr(self, name) for name in names.split()}

    def on_iteration_begin(self, iteration: int, logs: Logs = None) -> None:
        """From here on the gap is that of all pairs of the iteration."""
        self._gap_is = "given"

    def on_run_end(self, logs: Logs = None) -> None:
        """A `fit` outside of `SelfPlay` streams the gap again."""
        self._gap_is = "unknown"

    def on_score_end(
        self, iteration: int, pairs: PairBatch, logs: Logs = None
    ) -> None:
        """Sets the gap of the iteration, and the order of its first step."""
        self.model.gap_sums.assign(pair_moments(pairs))
        self._set_gap(self.gap.gap(pairs))
        self.model.alpha.assign(self._order())

    def on_train_begin(self, logs: Logs = None) -> None:
        """A `fit` starts."""
        warn_without_order(self)
        self._num_seen = self.model.recent.num_batches
        if self._gap_is != "given":
            self._gap_is = "unknown"

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """The first epoch of all is the one in which the gap is streamed."""
        if self._gap_is == "unknown":
            if epoch == 0:
                self.model.reset_order()
            sums = keras.ops.convert_to_numpy(self.model.gap_sums)
            self._gap_is = "final" if sums[:, 0].any() else "streamed"
        elif self._gap_is == "streamed":
            self._gap_is = "final"

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Sets the order for the batches to come."""
        # Several at once where Keras executes several steps.
        batches = self.model.recent.since(self._num_seen)
        self._num_seen += len(batches)
        # A batch whose weights are all 0 says nothing.
        batches = [pairs for pairs in batches if len(pairs.sample_weight)]
        if not batches:
            return
        if self._gap_is == "streamed":
            for pairs in batches:
                self._stream(pairs)
        self.model.alpha.assign(self._capped(self._order(), batches[-1]))

    def _stream(self, pairs: PairBatch) -> None:
        """Adds a batch to what is known of the gap."""
        sums = keras.ops.convert_to_numpy(self.model.gap_sums)
        if isinstance(self.gap, RenyiGap):
            sums = add_moments(sums, pair_moments(pairs))
            gap = gap_of_moments(sums)
        else:
            # The gap of the batch in the place of a log-prob.
            weight = pairs.sample_weight.sum()
            new = np.array([[weight, self.gap.gap(pairs), 0.0, weight]] * 2)
            sums = add_moments(sums, new)
            gap = float(sums[0, 1])
        self.model.gap_sums.assign(sums)
        self._set_gap(gap)

    def _set_gap(self, gap: Any) -> None:
        if gap is None or not np.isfinite(gap):
            raise FloatingPointError(
                f"The gap is {gap}, expected a finite number of nats. Check "
                f"{type(self.gap).__name__} and the opponent's log-probs."
            )
        self.model.gap.assign(gap)

    def _order(self) -> float:
        """What the rule says, before the guard."""
        gap = float(keras.ops.convert_to_numpy(self.model.gap))
        order = 1 + self.coefficient * gap
        return float(np.clip(order, self.min_alpha, self.max_alpha))

    def _capped(self, alpha: float, pairs: PairBatch) -> float:
        """What the guard leaves of an order for the batch."""
        order = guarded_order(
            alpha,
            pairs.log_ratio,
            pairs.sample_weight,
            min_effective_sample_size=self.min_effective_sample_size,
        )
        return float(keras.ops.convert_to_numpy(order))


def guarded_order(
    alpha: Tensor,
    log_ratio: Tensor,
    sample_weight: Tensor | None = None,
    *,
    min_effective_sample_size: float = 0.5,
) -> Tensor:
    """The largest order up to `alpha` that keeps enough of a batch.

    Args:
        alpha: An order, a number or a scalar tensor.
        log_ratio: Policy minus opponent log-probs, shape `(batch, 2)`.
        sample_weight: Weights of shape `(batch,)`, or None for ones.
        min_effective_sample_size: Share of the batch that annotated and
            synthetic weights both have to keep.

    Returns:
        One of 101 orders from `alpha` down to 0, a scalar tensor; where none
        keeps enough, that whose smaller effective sample size is largest. Of
        several that are it to a thousandth, as where every order leaves one
        pair alone, it's the closest to 1/2: there both sides weigh as sharply.
    """
    log_ratio = ops.convert_to_tensor(log_ratio)
    orders = alpha * ops.linspace(1.0, 0.0, 101)
    sizes = ops.minimum(
        effective_sample_size(log_ratio[:, 0], orders - 1, sample_weight),
        effective_sample_size(log_ratio[:, 1], orders, sample_weight),
    )
    enough = sizes >= min_effective_sample_size
    largest = ops.max(ops.where(enough, orders, -1.0))
    is_best = sizes >= 0.999 * ops.max(sizes)
    distance = ops.where(is_best, ops.abs(orders - 0.5), np.inf)
    fallback = ops.take(orders, ops.argmin(distance))
    return ops.where(ops.any(enough), largest, fallback)
