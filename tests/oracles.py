"""The formulas of the package, written again in float64 NumPy."""

import numpy as np


def sequence_log_probs(logits, token_ids, response_mask):
    """Token by token: logits (rows, time, vocabulary) to (rows,), nats."""
    logits = np.asarray(logits, "float64")
    totals = []
    for row in range(len(logits)):
        total = 0.0
        for t in np.flatnonzero(response_mask[row]):
            z = logits[row, t - 1]
            total += z[token_ids[row, t]] - np.log(np.sum(np.exp(z)))
        totals.append(total)
    return np.array(totals)


def tilted_risk(values, tilt, weight=None):
    """Li et al., arXiv 2007.01162, eq. 2, in extended precision."""
    f = np.asarray(values, "longdouble")
    p = np.ones_like(f) if weight is None else np.asarray(weight, "longdouble")
    p = p / p.sum()
    if abs(tilt) < 1e-6:  # its series
        mean = np.sum(p * f)
        return float(mean + tilt / 2 * np.sum(p * (f - mean) ** 2))
    t = np.longdouble(tilt)
    # Without a shift, in logarithms: log(a + b) one after the other.
    return float(np.logaddexp.reduce(t * f + np.log(p)) / t)


def tilted_weights(values, tilt, weight=None):
    """softmax(tilt * values + log p)."""
    z = tilt * np.asarray(values, "float64")
    p = np.ones_like(z) if weight is None else np.asarray(weight, "float64")
    return np.array(
        [p[i] / np.sum(p * np.exp(z - z[i])) for i in range(len(z))]
    )


def iris(real, synthetic, alpha, weight=None):
    """IRIS, arXiv 2604.20933, of two lists of log-ratios."""
    return tilted_risk(-np.asarray(real), 1 - alpha, weight) + tilted_risk(
        synthetic, alpha, weight
    )


def _mean(values, weight):
    return float(np.average(values, weights=weight))


def _log_sigmoid(z):
    return -np.logaddexp(0.0, -np.asarray(z, "float64"))


def spin(real, synthetic, beta, weight=None):
    """SPIN, arXiv 2401.01335: logistic loss of the scaled margin."""
    margin = np.asarray(real) - np.asarray(synthetic)
    return _mean(-_log_sigmoid(beta * margin), weight)


def space(real, synthetic, mu, weight=None):
    """SPACE, arXiv 2512.07175: s_mu(z) = 1 / (1 + mu e^-z)."""
    log_s = -np.logaddexp(0.0, np.log(mu) - np.asarray(real))
    # 1 - s_mu(z) = mu e^-z / (1 + mu e^-z)
    odds = np.log(mu) - np.asarray(synthetic)
    log_not_s = odds - np.logaddexp(0.0, odds)
    return _mean(-log_s, weight) - mu * _mean(log_not_s, weight)


def spif(real, synthetic, c, weight=None):
    """SPIF, arXiv 2602.01357, with the square completed."""
    real, synthetic = np.asarray(real), np.asarray(synthetic)
    bracket = (
        _mean(real, weight)
        - _mean(synthetic, weight)
        - c / 2 * (_mean(real**2, weight) + _mean(synthetic**2, weight))
    )
    return -2 / c * bracket + 2 / c**2


def tspin(policy, beta, proto_weight, weight=None):
    """T-SPIN, arXiv 2601.08198, of three columns of log-probs."""
    real, synthetic, proto = np.asarray(policy, "float64").T
    first = -_log_sigmoid(beta * (real - synthetic))
    second = -_log_sigmoid(beta * (synthetic - proto))
    return _mean(first + proto_weight * second, weight)


def renyi_divergence(p, q, alpha):
    """D_alpha(p || q) of two distributions, in nats."""
    p, q = np.asarray(p, "float64"), np.asarray(q, "float64")
    if alpha == 1:
        return float(np.sum(p * np.log(p / q)))
    return float(np.log(np.sum(p**alpha * q ** (1 - alpha))) / (alpha - 1))


def effective_sample_size(weights):
    """Kish: (sum w)^2 / (n sum w^2), n the number of positive weights."""
    w = np.asarray(weights, "float64")
    return w.sum() ** 2 / (np.count_nonzero(w) * np.sum(w**2))
