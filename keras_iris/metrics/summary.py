"""The monitoring values of one batch, on the host, in float64."""

import numpy as np

from keras_iris.metrics.recent import PairBatch


def effective_sample_size(
    values: np.ndarray, tilt: float, sample_weight: np.ndarray | None = None
) -> float:
    """Effective sample size of tilted weights, as a share of the batch.

    With `w_i` proportional to `sample_weight_i * exp(tilt * values_i)` it is
    `1 / (n * sum_i w_i^2)`: 1 for uniform weights, `1/n` where one example
    carries all (Kish, "Survey Sampling", 1965).

    Args:
        values: Per-example values, shape `(n,)`.
        tilt: The tilt, a number.
        sample_weight: Weights of shape `(n,)`, or None for ones.

    Returns:
        A number in (0, 1].
    """
    z = tilt * values
    weights = np.exp(z - z.max())
    if sample_weight is not None:
        weights = weights * sample_weight
    weights = weights / weights.sum()
    return float(1.0 / (len(values) * np.sum(weights**2)))


def token_gap(batch: PairBatch) -> float:
    """NLL per token of annotated minus synthetic responses.

    Args:
        batch: The batch.

    Returns:
        The gap in nats.
    """
    nll = real_and_synthetic_nll(batch)
    return nll[0] - nll[1]


def divergence(batch: PairBatch, alpha: float) -> float:
    """The variational Rényi estimate: minus the IRIS loss, in nats.

    Args:
        batch: The batch.
        alpha: The order.

    Returns:
        The estimate in nats.

    Reference: IRIS, arXiv 2604.20933; Birrell et al., arXiv 2007.03814.
    """
    real, synthetic = batch.log_ratio.T
    weight = batch.sample_weight
    return -(
        _tilted_risk(-real, 1 - alpha, weight)
        + _tilted_risk(synthetic, alpha, weight)
    )


def _tilted_risk(values: np.ndarray, tilt: float, weight: np.ndarray) -> float:
    """`keras_iris.losses.tilted_risk`, in NumPy."""
    if abs(tilt) < 1e-6:
        return float(np.average(values, weights=weight))
    z = tilt * values
    mean = np.average(np.exp(z - z.max()), weights=weight)
    return float((z.max() + np.log(mean)) / tilt)


def real_and_synthetic_nll(batch: PairBatch) -> tuple[float, float]:
    """NLL per token of both kinds under the policy, in nats."""
    weight = batch.sample_weight[:, None]
    nll = -np.sum(weight * batch.policy, axis=0)
    real, synthetic = nll / np.sum(weight * batch.num_tokens, axis=0)
    return float(real), float(synthetic)


def summary(batch: PairBatch, alpha: float) -> dict[str, float]:
    """The values that a run logs for a batch.

    Args:
        batch: The batch.
        alpha: Order of the weights whose effective sample size is taken.

    Returns:
        A dictionary of floats, named as the metrics of `keras_iris.metrics`.
    """
    weight = batch.sample_weight
    real, synthetic = batch.log_ratio.T
    margin = real - synthetic

    def mean(values: np.ndarray) -> float:
        return float(np.average(values, weights=weight))

    real_nll, synthetic_nll = real_and_synthetic_nll(batch)
    return {
        "real_log_ratio": mean(real),
        "synthetic_log_ratio": mean(synthetic),
        "margin": mean(margin),
        "margin_accuracy": mean(margin > 0),
        "real_ess": effective_sample_size(real, alpha - 1, weight),
        "synthetic_ess": effective_sample_size(synthetic, alpha, weight),
        "real_nll": real_nll,
        "synthetic_nll": synthetic_nll,
        "gap": real_nll - synthetic_nll,
    }
