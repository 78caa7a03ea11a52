"""A "language model" that is a table, and self-play with it: see tabular.py."""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_iris.callbacks import AlphaScheduler
from keras_iris.callbacks.gap import gap_of_moments, pair_moments
from keras_iris.losses import IRIS, SFT, SPACE, SPIF, SPIN, TSPIN
from keras_iris.metrics import PairBatch

SETTINGS = {
    "symbols": 20,
    "iterations": 5,
    "steps": 10,
    "rates": [float(f"{0.25 * 2 ** (i / 2):.4g}") for i in range(28)],
    "steps_until_solved": 400,
    "sampled_pairs": 2_048,
    "samples": 200,
}
ORDERS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
ADAPTIVE = "IRIS adaptive"
# What makes the loss, and the order; None where it follows the gap.
METHODS = {
    "SFT": (SFT, 1.0),
    "SPIN 0.1": (functools.partial(SPIN, 0.1), 1.0),
    "SPIN 1": (functools.partial(SPIN, 1.0), 1.0),
    "SPACE 1": (functools.partial(SPACE, 1.0), 1.0),
    "SPIF 1": (functools.partial(SPIF, 1.0), 1.0),
    "T-SPIN": (TSPIN, 1.0),
    **{f"IRIS {alpha:g}": (IRIS, alpha) for alpha in ORDERS},
    ADAPTIVE: (IRIS, None),
}


def make_problem(num_symbols):
    """Log-probs of the data and logits of the first opponent."""
    data, start = np.random.default_rng(0).normal(
        scale=1.5, size=(2, num_symbols)
    )
    return np.asarray(jax.nn.log_softmax(data)), start


def kl(log_p, log_q):
    """KL divergences of the last axis, in nats."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def d2(log_p, log_q):
    """The Rényi divergence of order 2, in nats."""
    return float(np.log(np.sum(np.exp(2 * log_p - log_q))))


def table_of(values, *log_probs):
    """All pairs of symbols, or triples.

    Args:
        values: What is wanted of a symbol, shape `(symbols,)`.
        *log_probs: Of the annotated symbol, the synthetic one, and of the
            proto-synthetic one if there is any, in that shape.

    Returns:
        Values of shape `(symbols ** n, n)`, and probabilities.
    """
    shape = (len(values),) * len(log_probs)
    columns = np.indices(shape).reshape(len(log_probs), -1)
    parts = [jnp.take(p, c) for p, c in zip(log_probs, columns, strict=True)]
    return jnp.stack([values[c] for c in columns], axis=1), jnp.exp(sum(parts))


class ExactGap:
    """`RenyiGap` of weighted pairs that stand for infinitely many."""

    def gap(self, pairs):
        """The gap, without the noise of a sample."""
        moments = pair_moments(pairs)
        moments[:, [0, 2, 3]] *= 1e12  # all sums but the mean
        return gap_of_moments(moments)


class Order:
    """What `AlphaScheduler` makes of an opponent: `alpha` and `gap`."""

    def __init__(self, log_data, log_old):
        self.alpha, self.gap = keras.Variable(1.0), keras.Variable(0.0)
        self.gap_sums = keras.Variable(np.zeros((2, 4)))
        opponent, weight = map(np.asarray, table_of(log_old, log_data, log_old))
        # All pairs are there: no batch is small, so its guard isn't asked.
        scheduler = AlphaScheduler(gap=ExactGap())
        scheduler.set_model(self)
        scheduler.on_score_end(
            1, PairBatch(opponent, opponent, np.ones_like(opponent), weight)
        )


def make_loss(loss, log_data, *log_first):
    """The loss as a function of logits, of the opponent and of alpha.

    Args:
        loss: Of the package.
        log_data: Log-probs of annotated symbols.
        *log_first: Those of the first policy, if the loss asks for them.
    """
    order = keras.Variable(1.0, trainable=False)
    loss.bind_alpha(order)

    def value(logits, log_old, alpha):
        log_probs = log_data, log_old, *log_first
        opponent, weight = table_of(log_old, *log_probs)
        policy, _ = table_of(jax.nn.log_softmax(logits), *log_probs)
        with keras.StatelessScope(state_mapping=[(order, alpha)]):
            return loss(opponent, policy, weight)

    return value


@functools.cache
def make_descent(make, num_symbols, num_steps, is_natural, num_responses):
    """A function that trains against an opponent, side by side for rates.

    It maps logits `(rates, symbols)`, orders and rates to logits
    `(rates, steps, symbols)` and losses `(rates,)`. With three responses the
    third is the first policy's.
    """
    log_data, start = make_problem(num_symbols)
    log_first = [jax.nn.log_softmax(start)] * (num_responses - 2)
    value = make_loss(make(), log_data, *log_first)

    def descend(start, alpha, rate):
        log_old = jax.nn.log_softmax(start)

        def step(logits, _):
            slope = jax.grad(value)(logits, log_old, alpha)
            if is_natural:  # the information is diagonal, but for a shift
                slope = jnp.clip(slope / jax.nn.softmax(logits), -1, 1)
            logits -= rate * slope
            return logits, logits

        last, path = jax.lax.scan(step, start, length=num_steps)
        return path, value(last, log_old, alpha)

    return jax.jit(jax.vmap(descend))


def play(name, settings, is_solved=False):
    """Self-play by one method, for all rates.

    Returns:
        Log-probs of shape `(rates, 1 + iterations * steps, symbols)`, and the
        orders, `(rates, iterations)`.
    """
    log_data, start = make_problem(settings["symbols"])
    make, alpha = METHODS[name]
    num_steps = settings["steps_until_solved" if is_solved else "steps"]
    # Of a natural gradient 1 is the step to the minimum, or near it.
    rates = 0.5 ** np.arange(6) if is_solved else np.array(settings["rates"])
    logits = np.tile(start, (len(rates), 1))
    path, orders = [logits[:, None]], []
    for iteration in range(settings["iterations"]):
        # In the first iteration synthetic symbols are the first policy's.
        num_responses = make().max_responses if iteration else 2
        descend = make_descent(
            make, settings["symbols"], num_steps, is_solved, num_responses
        )
        alphas = np.array(
            [
                _alpha(log_data, row) if alpha is None else alpha
                for row in logits
            ]
        )
        orders.append(alphas)
        steps, losses = map(np.asarray, descend(logits, alphas, rates))
        if is_solved:  # all go on from the lowest loss
            best = np.nanargmin(losses)
            steps = np.repeat(steps[best][None], len(rates), axis=0)
        path.append(steps)
        logits = steps[:, -1]
    log_probs = jax.nn.log_softmax(np.concatenate(path, axis=1))
    return np.asarray(log_probs), np.stack(orders, axis=1)


def _alpha(log_data, logits):
    if not np.isfinite(logits).all():  # too high a rate
        return 1.0
    order = Order(log_data, np.asarray(jax.nn.log_softmax(logits)))
    return float(order.alpha)
