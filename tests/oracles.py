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
