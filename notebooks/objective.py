# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The objective, in pictures
#
# The quickstart trains a language model. This notebook looks at what it is
# trained with: the losses, how they weigh responses, and where they lead. The
# "language model" here is a table of 20 symbols, so that nothing has to be
# sampled and every figure is exact. It takes under a minute on one core.
#
# The first cell chooses Keras' backend: `"jax"`, `"tensorflow"` or `"torch"`.
# It has to come before Keras is imported. In a hosted notebook install the
# package first.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras_iris.callbacks import RenyiGap
from keras_iris.losses import (
    IRIS,
    SFT,
    SPACE,
    SPIF,
    SPIN,
    tilted_risk,
    tilted_weights,
)
from keras_iris.metrics import PairBatch

# %% [markdown]
# ## Tilted risks
#
# A loss is usually a mean over examples. A tilted risk is a mean that looks
# more at some examples than at others:
#
# $$R_t(f) = \frac{1}{t} \log \frac{1}{n} \sum_i e^{t f_i}$$
#
# At tilt 0 it is the mean. With a growing tilt it goes to the largest value,
# with a falling one to the smallest.

# %%
values = np.array([1.0, 2.0, 6.0], "float32")
tilts = np.linspace(-6, 6, 49)
risks = [float(tilted_risk(values, tilt)) for tilt in tilts]

figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
axis.plot(tilts, risks)
axis.set(xlabel="tilt", ylabel="tilted risk of 1, 2 and 6")
axis.axhline(values.mean(), color="lightgrey", zorder=0)
_ = axis.annotate("mean", (-6, 3.1), color="grey")

# %% [markdown]
# Its gradient is a weighted mean of the examples' gradients. The weights are
# proportional to $e^{t f_i}$:

# %%
for tilt in (-1, 0, 1):
    weights = np.array(tilted_weights(values, tilt)).round(3)
    print(f"tilt {tilt:2}: weights", *weights)

# %% [markdown]
# ## A model that is a table
#
# The data are a distribution over 20 symbols. The opponent is the model as it
# was when it gave its answers, the policy is the model in training. At first
# both are the same.
#
# A pair has an annotated symbol, drawn from the data, and a synthetic one,
# drawn from the opponent. With 20 symbols there are 400 pairs. The loss gets
# them all, each weighted by its probability: its value is then the exact
# expectation.

# %%
NUM_SYMBOLS = 20


def log_softmax(logits):
    return logits - np.log(np.sum(np.exp(logits)))


rng = np.random.default_rng(0)
logits = rng.normal(scale=1.5, size=(2, NUM_SYMBOLS))
log_data, log_start = (log_softmax(row) for row in logits)
pairs = np.indices((NUM_SYMBOLS, NUM_SYMBOLS)).reshape(2, -1).T


def pair_weights(log_opponent):
    return np.exp(log_data[pairs[:, 0]] + log_opponent[pairs[:, 1]])


def loss_of(loss, log_policy, log_opponent):
    """The exact loss of a policy."""
    y_true, y_pred = log_opponent[pairs], log_policy[pairs]
    return float(loss(y_true, y_pred, pair_weights(log_opponent)))


def renyi(log_p, log_q, alpha):
    """The divergence of order alpha of q from p, in nats."""
    if alpha == 1:
        return np.sum(np.exp(log_p) * (log_p - log_q))
    mean = np.sum(np.exp(alpha * log_p + (1 - alpha) * log_q))
    return np.log(mean) / (alpha - 1)


f"{renyi(log_data, log_start, 1):.3f} nats between data and opponent (KL)"

# %% [markdown]
# ## IRIS
#
# The losses look at log-ratios: $r = \log p_{policy} - \log p_{opponent}$ of a
# response. IRIS has two tilted risks: of $-r$ over annotated responses with
# tilt $1 - \alpha$, and of $r$ over synthetic ones with tilt $\alpha$.
#
# Whatever the order $\alpha$, the loss is smallest where the policy is the
# data, and what it is there is known: $-D_\alpha / \alpha$, with Rényi's
# divergence of that order between data and opponent.

# %%
print("alpha  loss at the data  -D / alpha")
for alpha in (0.25, 0.5, 1, 2, 3):
    loss = loss_of(IRIS(alpha), log_data, log_start)
    print(f"{alpha:5}{loss:18.5f}", end="")
    print(f"{-renyi(log_data, log_start, alpha) / alpha:12.5f}")

# %% [markdown]
# ## Which responses count
#
# What the order changes is how much each response counts in the gradient. Below
# is a policy that is the data already: left the annotated symbols, right the
# synthetic ones, by their log-ratio.
#
# At order 1 all annotated responses count alike, as in supervised fine-tuning
# (SFT). Above 1 those count more whose probability has grown most; below 1
# those that lag behind. Of the synthetic responses those that have grown most
# always count more, and with a large order little else does.

# %%
ORDERS = {
    0.25: "#08519c",
    0.5: "#4292c6",
    1: "black",
    2: "#e6550d",
    3: "#7f2704",
}
ratio = log_data - log_start
order = np.argsort(ratio)


def draw_weights(axis, log_p, sign, tilt_of):
    """Importance weights over the symbols' probabilities."""
    p = np.exp(log_p)
    for alpha, color in ORDERS.items():
        weights = np.array(tilted_weights(sign * ratio, tilt_of(alpha), p)) / p
        axis.semilogy(ratio[order], weights[order], ".-", color=color)
    axis.set_xlabel("log-ratio, nats")


figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
draw_weights(axes[0], log_data, -1, lambda alpha: 1 - alpha)
draw_weights(axes[1], log_start, 1, lambda alpha: alpha)
axes[0].set(title="annotated", ylabel="weight, 1 if all count alike")
axes[1].set(title="synthetic")
_ = figure.legend([f"alpha {a:g}" for a in ORDERS], loc="outside right center")

# %% [markdown]
# ## Limits
#
# Orders 0 and 1 are limits of the formula, and ordinary values for the package:
# the loss is continuous there. At order 1 it is
# $-\overline{r} + \log \overline{e^{r}}$, at order 0
# $\log \overline{e^{-r}} + \overline{r}$; the first mean is over annotated
# responses, the second over synthetic ones.

# %%
log_policy = log_softmax((log_data + log_start) / 2)
r = log_policy - log_start
p, q = np.exp(log_data), np.exp(log_start)
formulas = {
    0: np.log(p @ np.exp(-r)) + q @ r,
    1: -(p @ r) + np.log(q @ np.exp(r)),
}
for alpha, formula in formulas.items():
    print(f"order {alpha}: formula {formula:.6f}")
    for near in (alpha, alpha + 1e-4, alpha + 1e-2):
        print(
            f"  IRIS({near:g}):",
            round(loss_of(IRIS(near), log_policy, log_start), 6),
        )

# %% [markdown]
# ## The other objectives
#
# SPIN, SPACE and SPIF are sums of tilted risks too, all of tilt 0: means of
# other losses of an example. The divergences behind them are relatives of
# IRIS's orders: of order 1 (KL) for SPIN, of 1/2 (Jensen-Shannon) for SPACE, of
# 2 (chi-squared) for SPIF. They are not the same losses. SFT is the mean of
# $-\log p$ of the annotated response alone.

# %%
y = np.zeros((1, 2), "float32")
for loss in (SFT(), SPIN(1.0), SPACE(1.0), SPIF(1.0), IRIS(0.5)):
    tilts = [float(risk.tilt) for risk in loss.risks(y, y)]
    print(f"{type(loss).__name__:5} tilts", *tilts)

# %% [markdown]
# ## How fast they get there
#
# The table as a Keras layer, and self-play with Keras' own training step: five
# iterations of ten steps. At the start of each the opponent becomes what the
# policy is by then. SFT is the control: it goes on for as many steps. The
# learning rates are the best of each method, from `benchmarks/tabular.py`.


# %%
class Table(keras.layers.Layer):
    """Log-probs of the two symbols of each pair."""

    def __init__(self):
        super().__init__()
        self.logits = self.add_weight(shape=(NUM_SYMBOLS,))
        self.logits.assign(log_start)

    def call(self, pairs):
        log_probs = keras.ops.log_softmax(self.logits)
        return keras.ops.take(log_probs, pairs)


def play(loss, learning_rate):
    """KL of the data from the policy, before each step and at the end."""
    table = Table()
    inputs = keras.Input((2,), dtype="int32")
    model = keras.Model(inputs, table(inputs))
    model.compile(keras.optimizers.SGD(learning_rate), loss)

    def log_policy():
        return log_softmax(keras.ops.convert_to_numpy(table.logits.value))

    found = []
    for _ in range(5):
        log_old = log_policy()
        opponent = log_old[pairs].astype("float32")
        weight = pair_weights(log_old).astype("float32")
        for _ in range(10):
            found.append(renyi(log_data, log_policy(), 1))
            model.train_on_batch(pairs, opponent, weight)
    return [*found, renyi(log_data, log_policy(), 1)]


METHODS = {
    "SFT": (SFT(), 8.0, "black"),
    "SPIN": (SPIN(1.0), 16.0, "grey"),
    "SPACE": (SPACE(1.0), 16.0, "#007f5f"),
    "SPIF": (SPIF(1.0), 2.0, "#a8487f"),
    "IRIS 0.5": (IRIS(0.5), 8.0, "#4292c6"),
    "IRIS 1": (IRIS(1), 8.0, "#f0c808"),
    "IRIS 2": (IRIS(2), 8.0, "#e6550d"),
}
curves = {name: play(loss, rate) for name, (loss, rate, _) in METHODS.items()}

# %%
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, curve in curves.items():
    is_control = name == "SFT"
    axis.semilogy(
        curve,
        label=name,
        color=METHODS[name][2],
        linestyle="--" if is_control else "-",
        zorder=3 if is_control else 2,
    )
for step in range(10, 50, 10):
    axis.axvline(step, color="lightgrey", zorder=0)
axis.set(xlabel="step; a new opponent at each line", ylabel="KL, nats")
_ = figure.legend(loc="outside right center")

# %% [markdown]
# Order 1 lies on SFT: with exact expectations they are the same. At the start
# of an iteration every order has SFT's gradient; they differ once the policy
# has moved. Here order 1/2 ends nearer to the data than SFT, and order 2
# further away. On sampled batches the synthetic term adds noise, which this
# table doesn't have: it shows the objective, and not what self-play is worth.
# The page `docs/evidence.md` has what is measured.
#
# ## The gap
#
# `AlphaScheduler` sets the order to 1 + 0.5 gap. The gap is estimated from the
# opponent's log-probs of annotated and synthetic responses. It is a lower bound
# of the divergence of order 2. From 2,048 sampled pairs:

# %%
for name, log_old in {
    "opponent": log_start,
    "halfway": log_policy,
    "data": log_data,
}.items():
    drawn = [
        rng.choice(NUM_SYMBOLS, size=2048, p=np.exp(log_p))
        for log_p in (log_data, log_old)
    ]
    log_probs = log_old[np.stack(drawn, axis=1)]
    ones = np.ones_like(log_probs)
    gap = RenyiGap().gap(PairBatch(log_probs, log_probs, ones, ones[:, 0]))
    print(
        f"{name:9} gap {gap:.3f}, divergence {renyi(log_data, log_old, 2):.3f}"
    )
