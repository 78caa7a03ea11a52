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
# # Several devices, tried on one processor
#
# On JAX a model that is too large for one device is cut over several by one
# argument. The same works without any: JAX can pretend that a processor is
# eight devices. This notebook trains one step on one device and on eight, and
# compares. It takes about a minute on two CPU cores.
#
# `KERAS_BACKEND` chooses the backend of every keras_iris program. Cutting a
# model is for JAX; PyTorch and TensorFlow train with whole copies of the model,
# see `docs/distribution.md`.

# %%
import os

os.environ["KERAS_BACKEND"] = "jax"
# Before JAX is imported. On real devices leave this line out.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import keras_iris
import jax
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

jax.devices()

# %% [markdown]
# ## A model and a batch
#
# A small Llama with random weights, and sixteen random pairs: to see where
# weights lie nothing has to be learnt. `make` gives the same weights each time.

# %%
VOCABULARY = 512


def make():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=8,
        num_key_value_heads=8,
        hidden_dim=128,
        intermediate_dim=256,
    )
    causal_lm = keras_hub.models.Llama3CausalLM(
        backbone=backbone, preprocessor=None
    )
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.AdamW(1e-3), keras_iris.losses.IRIS())
    return model


rng = np.random.default_rng(0)


def ids():
    return rng.integers(3, VOCABULARY, 8).astype("int32")


examples = [keras_iris.data.Example(ids(), ids()) for _ in range(16)]
pairs = keras_iris.data.PairDataset(
    examples, [ids() for _ in examples], batch_size=16, bucket_lengths=[16]
)


def train(model):
    losses = model.fit(pairs, epochs=4, verbose=0).history["loss"]
    weights = [v.numpy() for v in model.trainable_variables]
    return losses, weights


expected, expected_weights = train(make())
expected

# %% [markdown]
# ## On eight devices
#
# `make_distribution` makes a distribution of Keras from the roles of weights:
# `"fsdp"` cuts weights, gradients and the optimizer's state over the devices
# that share the batch. It has to be set before the model is made. Everything
# after that is as on one device.

# %%
distribution = keras_iris.distribution.make_distribution(strategy="fsdp")
keras.distribution.set_distribution(distribution)
model = make()
print(keras_iris.distribution.sharding_report(model.causal_lm))

# %% [markdown]
# The report says what every device holds whole, and why. Here it is what is
# too small to be worth cutting.
#
# Now the same four steps.

# %%
losses, weights = train(model)
difference = max(
    np.abs(a - b).max() for a, b in zip(weights, expected_weights, strict=True)
)
print("losses, one device:   ", *np.round(expected, 6))
print("losses, eight devices:", *np.round(losses, 6))
print(f"largest difference of a weight: {difference:.1e}")

# %% [markdown]
# ## Where a matrix lies
#
# A picture of a matrix of the feed-forward network: which device holds which
# part. With `"fsdp"` the devices share it.

# %%
largest = max(model.trainable_variables, key=lambda v: np.prod(v.shape))
array = largest.value
picture = np.zeros(array.shape)
for shard in array.addressable_shards:
    picture[shard.index] = shard.device.id
figure, axis = plt.subplots(figsize=(5, 2.2), layout="constrained")
image = axis.imshow(picture, aspect="auto", interpolation="nearest")
axis.set(title=f"{largest.path.split('/')[-2]}, {array.shape}")
_ = figure.colorbar(image, label="device")

# %% [markdown]
# ## Two axes
#
# `"2d"` cuts matrices over a second axis as well, by the role that they have in
# the decoder: heads and feed-forward units by columns or by rows.

# %%
keras.distribution.set_distribution(
    keras_iris.distribution.make_distribution(
        mesh={"data": 2, "model": 4}, strategy="2d"
    )
)
losses, weights = train(make())
difference = max(
    np.abs(a - b).max() for a, b in zip(weights, expected_weights, strict=True)
)
print("losses, two by four:  ", *np.round(losses, 6))
print(f"largest difference of a weight: {difference:.1e}")
