"""The language model of headline_g2p.py: a small decoder in plain JAX.

KerasHub's would do as well; hundreds of short runs on one core start and draw
answers faster with this one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from headline_data import END, PAD, PROMPT, RESPONSE, edit_distances

LENGTH = PROMPT + RESPONSE - 1  # inputs: the last token has no successor
HEADS = 4


def init(key, num_symbols, size):
    """Weights, not trained.

    Args:
        key: A random key.
        num_symbols: The size of the vocabulary.
        size: "layers", "width" and "inner_width".
    """
    width, inner = size["width"], size["inner_width"]
    shapes = {
        "attention": (width, 3 * width),
        "output": (width, width),
        "up": (width, inner),
        "down": (inner, width),
    }

    def normal(name, shape):
        # Not `hash`, which differs from process to process.
        number = int.from_bytes(name.encode(), "big") % 2**31
        return 0.02 * jax.random.normal(jax.random.fold_in(key, number), shape)

    return {
        "symbols": normal("symbols", (num_symbols, width)),
        "positions": normal("positions", (LENGTH, width)),
        "layers": [
            {name: normal(f"{i}{name}", s) for name, s in shapes.items()}
            for i in range(size["layers"])
        ],
    }


def _normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _attend(query, key, value, mask):
    """Attention; `(batch, time, width)` each, the mask `(time, time)`."""

    def heads(x):
        return x.reshape(*x.shape[:-1], HEADS, -1)

    query, key, value = heads(query), heads(key), heads(value)
    scores = jnp.einsum("bthd,bshd->bhts", query, key)
    scores = jnp.where(mask, scores / query.shape[-1] ** 0.5, -1e9)
    x = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)
    return x.reshape(*x.shape[:-2], -1)


def _layers(params, x, attend):
    """The decoder's layers; `attend(number, query, key, value)`."""
    for number, layer in enumerate(params["layers"]):
        parts = jnp.split(_normalize(x) @ layer["attention"], 3, axis=-1)
        x = x + attend(number, *parts) @ layer["output"]
        x = x + jax.nn.relu(_normalize(x) @ layer["up"]) @ layer["down"]
    return x


def _log_softmax(params, x):
    """Log-probs of the next symbol; padding is none."""
    logits = _normalize(x) @ params["symbols"].T
    return jax.nn.log_softmax(logits.at[..., PAD].set(-1e9))


def log_probs(params, rows):
    """Log-probs of responses, in nats, shape `(batch,)`."""
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    x = params["symbols"][rows[:, :-1]] + params["positions"]
    x = _layers(params, x, lambda _, *parts: _attend(*parts, mask))
    responses = rows[:, PROMPT:]
    found = jnp.take_along_axis(
        _log_softmax(params, x[:, PROMPT - 1 :]), responses[..., None], axis=-1
    )[..., 0]
    return jnp.sum(found * (responses != PAD), axis=-1)


def generate(params, rows, key, is_greedy=False):
    """Rows with responses of the model in place of their own.

    Args:
        params: Weights.
        rows: Token ids, shape `(batch, PROMPT + RESPONSE)`.
        key: A random key; temperature is 1.
        is_greedy: Whether to take the likeliest symbols instead.
    """
    rows = jnp.asarray(rows)
    batch, width = len(rows), params["symbols"].shape[1]
    empty = jnp.zeros((batch, LENGTH, width))

    def step(carry, position):
        caches, token, is_done = carry
        filled = []

        def attend(number, query, *new):
            filled.append(
                [
                    cache.at[:, position].set(each[:, 0])
                    for cache, each in zip(caches[number], new, strict=True)
                ]
            )
            return _attend(query, *filled[-1], jnp.arange(LENGTH) <= position)

        x = params["symbols"][token] + params["positions"][position]
        x = _layers(params, x[:, None], attend)[:, 0]
        log_p = _log_softmax(params, x)
        if is_greedy:
            answer = jnp.argmax(log_p, axis=-1)
        else:
            step_key = jax.random.fold_in(key, position)
            answer = jax.random.categorical(step_key, log_p)
        answer = jnp.where(is_done, PAD, answer).astype("int32")
        is_prompt = position + 1 < PROMPT
        token = jnp.where(is_prompt, rows[:, position + 1], answer)
        return (filled, token, is_done | (token == END)), token

    caches = [[empty, empty] for _ in params["layers"]]
    start = (caches, rows[:, 0], jnp.zeros(batch, bool))
    _, tokens = jax.lax.scan(step, start, jnp.arange(LENGTH))
    return jnp.concatenate([rows[:, :1], tokens.T], axis=1)


jit_log_probs = jax.jit(log_probs)
jit_generate = jax.jit(generate, static_argnames="is_greedy")


def evaluate(params, rows, key):
    """Scores of rows that were not trained on.

    Args:
        params: Weights.
        rows: Token ids, shape `(words, PROMPT + RESPONSE)`.
        key: Of the samples: the same for models that are to be compared.

    Returns:
        "nll" in nats per token; phoneme error rate "per" and word accuracy
        "acc" of "greedy" answers and of one "sampled" a word.
    """
    responses = rows[:, PROMPT:]
    num_tokens = np.sum(responses != PAD)
    scores = {"nll": float(-jit_log_probs(params, rows).sum() / num_tokens)}
    for kind in ("greedy", "sampled"):
        answers = jit_generate(params, rows, key, is_greedy=kind == "greedy")
        errors = edit_distances(np.asarray(answers)[:, PROMPT:], responses)
        scores[f"per {kind}"] = float(errors.sum() / num_tokens)
        scores[f"acc {kind}"] = float(np.mean(errors == 0))
    return scores
