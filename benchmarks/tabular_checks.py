"""Gap, second-order view and weights of the table: see tabular.py."""

import jax
import numpy as np
from tabular_problem import ORDERS, Order, d2, make_loss, make_problem

from keras_iris.callbacks import RenyiGap
from keras_iris.losses import IRIS, tilted_weights
from keras_iris.metrics import PairBatch, effective_sample_size


def sample_pairs(log_data, log_old, num_pairs, rng):
    """Drawn annotated and synthetic symbols, shape `(pairs, 2)`."""
    p = np.exp(np.stack([log_data, log_old]))
    p /= p.sum(axis=1, keepdims=True)
    return np.stack([rng.choice(len(q), num_pairs, p=q) for q in p], axis=1)


def sampled_gaps(log_data, log_old, settings):
    """`RenyiGap` of that many pairs, once for each sample."""
    num_pairs, rng = settings["sampled_pairs"], np.random.default_rng(1)
    ones = np.ones((num_pairs, 2))
    gaps = []
    for _ in range(settings["samples"]):
        drawn = log_old[sample_pairs(log_data, log_old, num_pairs, rng)]
        pairs = PairBatch(drawn, drawn, ones, ones[:, 0])
        gaps.append(RenyiGap().gap(pairs))
    return gaps


def measure_gaps(settings):
    """Gaps and divergences of order 2, one row an opponent.

    Returns:
        Rows for opponents on the way from the first one to the data; and
        pairs `(divergence, gap)` of random opponents and data.
    """
    log_data, start = make_problem(settings["symbols"])
    rows = []
    for share in (0, 0.25, 0.5, 0.75, 0.9, 1):
        logits = (1 - share) * start + share * log_data
        log_old = np.asarray(jax.nn.log_softmax(logits))
        order, gaps = (
            Order(log_data, log_old),
            sampled_gaps(log_data, log_old, settings),
        )
        rows.append(
            {
                "share of the way": float(share),
                "D_2": d2(log_data, log_old),
                "gap": float(order.gap),
                "sampled": float(np.mean(gaps)),
                "deviation": float(np.std(gaps)),
                "alpha": float(order.alpha),
            }
        )
    rng = np.random.default_rng(2)
    pairs = []
    for scale in rng.uniform(0.1, 1.5, settings["samples"]):
        p, q = jax.nn.log_softmax(
            rng.normal(scale=scale, size=(2, settings["symbols"]))
        )
        pairs.append((d2(p, q), float(Order(p, q).gap)))
    return rows, np.array(pairs)


class SecondOrder:
    """The loss near an opponent, and what objective and covariances say.

    Args:
        log_data: Log-probs of the data, shape `(symbols,)`.
        log_old: Of the opponent.
    """

    def __init__(self, log_data, log_old):
        value = make_loss(IRIS(), log_data)
        self.slope = jax.jit(jax.grad(value))
        self.curvature = jax.jit(jax.hessian(value))
        self.values = jax.jit(jax.vmap(value, (0, None, None)))
        self.log_old = log_old
        p, q = np.exp(log_data), np.exp(log_old)
        score = np.eye(len(q)) - q  # a row a symbol
        self.mean = p @ score
        self.of_data = (score.T * p) @ score - np.outer(self.mean, self.mean)
        self.of_model = (score.T * q) @ score
        # The information of a table doesn't depend on the symbol seen.
        self.observed = self.of_model

    def hessian(self, alpha):
        """What the view says it is."""
        excess = self.of_data - self.of_model
        return self.observed + (1 - alpha) * excess

    def row(self, alpha):
        """How well the view holds, and what it says about a Newton step."""
        slope = self.slope(self.log_old, self.log_old, alpha)
        hessian = self.curvature(self.log_old, self.log_old, alpha)
        steps = np.array([0.02, 0.01])
        errors = self.errors(alpha, steps)
        return {
            "alpha": alpha,
            "gradient error": float(np.abs(slope + self.mean).max()),
            "hessian error": float(np.abs(hessian - self.hessian(alpha)).max()),
            "error ratio": float(errors[1] / errors[0]),
            "newton step": self.newton(alpha),
            "data over model": self.excess(),
        }

    def excess(self):
        """How much more the data's scores vary, along SFT's Newton step."""
        step = np.linalg.pinv(self.observed) @ self.mean
        return float(
            (step @ self.of_data @ step) / (step @ self.of_model @ step)
        )

    def errors(self, alpha, steps):
        """Loss minus its second-order view, that far in random directions.

        Root of the mean square; the unit is a standard deviation of the
        log-ratio under the opponent.
        """
        directions = np.random.default_rng(5).normal(
            size=(50, len(self.log_old))
        )
        norms = np.einsum("di,ij,dj->d", directions, self.of_model, directions)
        d = directions / np.sqrt(norms)[:, None]
        d = np.multiply.outer(steps, d)  # (steps, directions, symbols)
        view = -d @ self.mean
        view += np.einsum("...i,ij,...j", d, self.hessian(alpha), d) / 2
        flat = (self.log_old + d).reshape(-1, d.shape[-1])
        value = self.values(flat, self.log_old, alpha)
        error = np.asarray(value).reshape(view.shape) - view
        return np.sqrt(np.mean(error**2, axis=1))

    def newton(self, alpha):
        """Length of the Newton step, None where the loss isn't convex."""
        hessian = self.hessian(alpha)
        # A shift of all logits changes nothing: one eigenvalue is 0.
        if np.linalg.eigvalsh(hessian)[0] < -1e-12:
            return None
        step = np.linalg.pinv(hessian, rcond=1e-10) @ self.mean
        return float(np.sqrt(step @ self.of_model @ step))


def check_second_order(settings):
    """Rows for every order, at a far and at a near opponent."""
    log_data, start = make_problem(settings["symbols"])
    rows, views = [], {}
    for name, share in (("far", 0.0), ("near", 0.9)):
        logits = (1 - share) * start + share * log_data
        view = SecondOrder(log_data, np.asarray(jax.nn.log_softmax(logits)))
        views[name] = view
        rows += [{"opponent": name} | view.row(alpha) for alpha in ORDERS]
    return rows, views


def sample_sizes(log_data, log_old, settings, orders):
    """Mean effective sample sizes of batches of 64 at the solution.

    Returns:
        Array of shape `(2, orders)`: annotated, synthetic.
    """
    ratio, rng = log_data - log_old, np.random.default_rng(3)
    sizes = []
    for _ in range(settings["samples"]):
        real, synthetic = ratio[sample_pairs(log_data, log_old, 64, rng)].T
        sizes.append(
            [
                np.asarray(effective_sample_size(real, orders - 1)),
                np.asarray(effective_sample_size(synthetic, orders)),
            ]
        )
    return np.mean(sizes, axis=0)


def relative_weights(log_data, log_old, alpha):
    """Importance weights over probabilities, annotated and synthetic."""
    ratio, p, q = log_data - log_old, np.exp(log_data), np.exp(log_old)
    return (
        np.asarray(tilted_weights(-ratio, 1 - alpha, p)) / p,
        np.asarray(tilted_weights(ratio, alpha, q)) / q,
    )
