"""SFT and self-play of headline_g2p.py, with the package's losses.

What `SelfPlay` does, with a small model in plain JAX: before each iteration the
policy as it is becomes the opponent, answers every prompt at temperature 1,
and has its log-probs computed once; the gap of all pairs sets the order, and a
guard caps it after each batch.
"""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from headline_data import PROMPT
from headline_model import generate, jit_log_probs, log_probs

from keras_iris.callbacks import AlphaScheduler, RenyiGap
from keras_iris.callbacks.alpha_scheduler import guarded_order
from keras_iris.metrics import PairBatch

WARM_UP = 0.1  # share of the steps
_ADAPTIVE = AlphaScheduler()  # for its defaults
_GENERATED_AT_ONCE = 1_024  # rows


def make_optimizer_state(params):
    """Adam's two moments and the number of the step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return zeros, zeros, jnp.zeros(())


def _adam(params, state, gradient, rate):
    """A step of Adam; the gradient's norm is clipped to 1."""
    first, second, step = state
    step = step + 1
    squares = [jnp.sum(g * g) for g in jax.tree.leaves(gradient)]
    scale = 1 / jnp.maximum(jnp.sqrt(sum(squares)), 1)
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(
        lambda v, g: 0.98 * v + 0.02 * g * g, second, gradient
    )

    def update(p, m, v):
        deviation = jnp.sqrt(v / (1 - 0.98**step)) + 1e-8
        return p - rate * m / (1 - 0.9**step) / deviation

    params = jax.tree.map(update, params, first, second)
    return params, (first, second, step)


def _rate(step, num_steps):
    """Share of the largest rate: warm-up, then half a cosine to zero."""
    warm_up = WARM_UP * num_steps
    falling = (step - warm_up) / (num_steps - warm_up)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(falling, 0, 1)))
    return jnp.minimum((step + 1) / warm_up, cosine)


def as_pairs(values, num_kinds, num_samples):
    """Pairs, or triples, of what is known of each response.

    Args:
        values: Shape `(1 + num_kinds * num_samples, batch)`: of annotated
            responses, of synthetic ones, and of proto-synthetic ones where
            there are two kinds.
        num_kinds: Kinds of responses beside annotated ones, 0 to 2.
        num_samples: Responses of a kind to each prompt.

    Returns:
        Shape `(num_samples * batch, columns)`. A loss that is of annotated
        responses alone, no kinds, gets them twice.
    """
    annotated = jnp.tile(values[0], num_samples)
    if num_kinds == 0:
        return jnp.stack([annotated, annotated], axis=1)
    others = jnp.reshape(values[1:], (num_kinds, -1))
    return jnp.stack([annotated, *others], axis=1)


@functools.cache
def _make_loss(method):
    return method.make()


def _num_kinds(method, iteration):
    """Kinds of responses beside annotated ones: see `as_pairs`."""
    loss = _make_loss(method)
    if not loss.uses_synthetic:
        return 0
    # In the first iteration synthetic responses are the first policy's.
    return 1 if iteration == 0 else loss.max_responses - 1


@functools.cache
def make_training(method, num_kinds):
    """A compiled function that trains for an epoch.

    Args:
        method: Of `headline_plan`.
        num_kinds: As in `as_pairs`.

    Returns:
        A function of weights, the optimizer's state, rows `(steps, responses,
        batch, length)`, their opponent's log-probs `(steps, responses, batch)`,
        and a dictionary of scalars: "rate", "num_steps" of the whole run,
        "order" of the rule, "alpha" of the first step, and "guard", the share
        that the guard keeps. It gives weights, state, and the orders that the
        guard leaves after each step.
    """
    loss = _make_loss(method)
    order = keras.Variable(1.0, trainable=False)
    loss.bind_alpha(order)
    pairs = functools.partial(
        as_pairs, num_kinds=num_kinds, num_samples=method.num_samples
    )

    def value(params, rows, opponent, alpha):
        flat = log_probs(params, rows.reshape(-1, rows.shape[-1]))
        opponent, policy = pairs(opponent), pairs(flat.reshape(rows.shape[:2]))
        with keras.StatelessScope(state_mapping=[(order, alpha)]):
            return loss(opponent, policy), policy - opponent

    def train(params, state, rows, opponent, scalars):
        def step(carry, batch):
            params, state, alpha = carry
            gradient, ratio = jax.grad(value, has_aux=True)(
                params, *batch, alpha
            )
            rate = scalars["rate"] * _rate(state[2], scalars["num_steps"])
            params, state = _adam(params, state, gradient, rate)
            alpha = guarded_order(
                scalars["order"],
                ratio[:, :2],
                min_effective_sample_size=scalars["guard"],
            )
            return (params, state, alpha), alpha

        carry = params, state, scalars["alpha"]
        (params, state, _), orders = jax.lax.scan(step, carry, (rows, opponent))
        return params, state, orders

    return jax.jit(train)


def _epoch(key, num_rows, batch_size):
    """Numbers of the rows of an epoch, `(steps, batch)`; the rest is left."""
    steps = num_rows // batch_size
    order = jax.random.permutation(key, num_rows)
    return np.asarray(order[: steps * batch_size]).reshape(steps, batch_size)


def fine_tune(params, rows, key, method, settings):
    """Trains by a method that is of annotated responses alone: by SFT.

    Args:
        params: Weights.
        rows: Of shape `(words, length)`.
        key: Of the order of the rows.
        method: Of `headline_plan`.
        settings: "epochs", "rate" and "batch_size".

    Returns:
        Weights.
    """
    train = make_training(method, 0)
    state = make_optimizer_state(params)
    epochs, size = settings["epochs"], settings["batch_size"]
    steps = epochs * (len(rows) // size)
    scalars = _scalars(settings["rate"], steps, 1.0, is_adaptive=False)
    for epoch in range(epochs):
        numbers = _epoch(jax.random.fold_in(key, epoch), len(rows), size)
        batches = rows[numbers][:, None]
        opponent = np.zeros(batches.shape[:3], "float32")
        params, state, _ = train(params, state, batches, opponent, scalars)
    return params


def _scalars(rate, num_steps, order, *, is_adaptive):
    share = _ADAPTIVE.min_effective_sample_size if is_adaptive else 0.0
    scalars = {
        "rate": rate,
        "num_steps": num_steps,
        "order": order,
        "alpha": order,
        "guard": share,
    }
    return {name: jnp.float32(number) for name, number in scalars.items()}


@functools.partial(jax.jit, static_argnames="num_samples")
def _answer(params, rows, key, num_samples):
    """Responses to every row, `(num_samples, words, length)`."""

    def answer(number):
        return generate(params, rows, jax.random.fold_in(key, number))

    return jax.lax.map(answer, jnp.arange(num_samples))


def _order(opponent, rows, num_samples):
    """The gap between annotated and synthetic rows, and what order it asks.

    Args:
        opponent: Its log-probs, `(responses, words)`.
        rows: Of shape `(responses, words, length)`.
        num_samples: Synthetic responses a prompt.
    """
    num_tokens = np.sum(rows[..., PROMPT:] != 0, axis=-1)
    opponent, num_tokens = (
        np.asarray(as_pairs(x, 1, num_samples)) for x in (opponent, num_tokens)
    )
    gap = RenyiGap().gap(
        PairBatch(
            opponent,
            opponent,
            num_tokens,
            np.ones(len(opponent)),
            num_samples=num_samples,
        )
    )
    order = 1 + _ADAPTIVE.coefficient * gap
    return gap, np.clip(order, _ADAPTIVE.min_alpha, _ADAPTIVE.max_alpha)


def self_play(params, rows, key, method, settings):
    """Self-play from weights, or SFT for the same number of steps.

    Args:
        params: Weights of the first policy.
        rows: Annotated rows, `(words, length)`.
        key: Of the order of the rows, the same for all methods, and of the
            samples.
        method: Of `headline_plan`.
        settings: "iterations", "epochs", "batch_size" and "rate".

    Returns:
        Weights, and the gap and mean order of each iteration, where the order
        follows the gap.
    """
    samples, is_adaptive = method.num_samples, method.alpha is None
    state = make_optimizer_state(params)
    epochs, size = settings["epochs"], settings["batch_size"]
    steps = settings["iterations"] * epochs * (len(rows) // size)
    order_key, answer_key = jax.random.split(key)
    first_answers, record = None, []
    for iteration in range(settings["iterations"]):
        kinds = _num_kinds(method, iteration)
        train = make_training(method, kinds)
        answers = []
        if kinds > 0:
            step_key = jax.random.fold_in(answer_key, iteration)
            answers.append(_answer(params, rows, step_key, samples))
            first_answers = answers[0] if iteration == 0 else first_answers
        if kinds > 1:
            answers.append(first_answers)
        responses = np.concatenate([rows[None], *answers])
        opponent = np.stack([jit_log_probs(params, each) for each in responses])
        gap, order = 0.0, method.alpha
        if is_adaptive:
            gap, order = _order(opponent, responses, samples)
        scalars = _scalars(
            settings["rate"], steps, order, is_adaptive=is_adaptive
        )
        orders = []
        for epoch in range(epochs):
            number = iteration * epochs + epoch
            numbers = _epoch(
                jax.random.fold_in(order_key, number), len(rows), size
            )
            batches = responses[:, numbers].swapaxes(0, 1)
            log_p = opponent[:, numbers].swapaxes(0, 1)
            params, state, used = train(params, state, batches, log_p, scalars)
            scalars["alpha"] = used[-1]
            orders.append(float(used.mean()))
        if is_adaptive:
            record.append({"gap": gap, "order": float(np.mean(orders))})
    return params, record
