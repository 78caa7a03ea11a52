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
# # Self-play fine-tuning, step by step
#
# A language model is usually fine-tuned on prompts with annotated answers:
# supervised fine-tuning (SFT). Self-play goes on from there with the same data.
# The model answers the prompts itself, learns to give the annotated answers
# more probability and its own answers less, and then answers anew.
#
# This notebook does it with Keras' own `fit`, on a problem that is small enough
# for two CPU cores and under three minutes: from the spelling of an English
# word to its pronunciation. It also trains a control, without which a result
# of self-play says nothing.
#
# The first cell chooses Keras' backend: `"jax"`, `"tensorflow"` or `"torch"`.
# It has to come before Keras is imported.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras_iris
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

keras.utils.set_random_seed(0)

# %% [markdown]
# ## The data
#
# The CMU Pronouncing Dictionary comes with the package. A prompt is a word,
# letter by letter, and the annotated answer is its phonemes. `SymbolTokenizer`
# makes one token of each symbol; `tokenize` adds the end token to the answers.
#
# The model is trained on 2,048 words. It never sees the 512 words that are held
# out.

# %%
words = [
    (word, phonemes)
    for word, phonemes in keras_iris.data.cmudict()
    if word.isalpha() and 3 <= len(word) <= 7 and len(phonemes) <= 7
]
letters = sorted({letter for word, _ in words for letter in word})
phonemes = sorted({phoneme for _, answer in words for phoneme in answer})
tokenizer = keras_iris.data.SymbolTokenizer([*letters, "=>", *phonemes])

order = np.random.default_rng(0).permutation(len(words))[:2560]
rows = [
    {
        "prompt": " ".join(words[i][0]) + " =>",
        "response": " ".join(words[i][1]),
    }
    for i in order
]
examples = keras_iris.data.tokenize(
    keras_iris.data.read_conversations(rows),
    tokenizer,
    max_prompt_length=8,
    max_response_length=8,
)
train, held_out = examples[:2048], examples[2048:]
rows[:2]

# %% [markdown]
# ## The model
#
# A decoder of the Qwen 2 architecture with 0.3 million parameters, from
# KerasHub, with random weights. `SelfPlayModel` makes a Keras model of it that
# takes a prompt with two answers: the annotated one and one of the model's own,
# the synthetic one. It predicts the log-probability of each, in nats.


# %%
def make_causal_lm():
    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=tokenizer.vocabulary_size,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=128,
        intermediate_dim=256,
        tie_word_embeddings=True,
    )
    return keras_hub.models.QwenCausalLM(backbone=backbone, preprocessor=None)


causal_lm = make_causal_lm()
model = keras_iris.SelfPlayModel(causal_lm)
f"{causal_lm.count_params():,} parameters"

# %% [markdown]
# ## Supervised fine-tuning
#
# Self-play starts from a model that was fine-tuned already. `SFT` is a loss of
# the same model: minus the log-probability of the annotated answer. There are
# no synthetic answers yet, so the annotated ones stand in their place; this
# loss doesn't look at them.
#
# `PairDataset` shuffles the words and pads them into batches. Here all batches
# have rows of 16 tokens, so that Keras compiles one step only.

# %%
BATCHES = {"batch_size": 32, "bucket_lengths": [16]}


def make_optimizer(learning_rate, epochs):
    steps = epochs * len(train) // BATCHES["batch_size"]
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    return keras.optimizers.AdamW(schedule)


annotated = [example.response_ids for example in train]
pairs = keras_iris.data.PairDataset(train, annotated, **BATCHES)
model.compile(make_optimizer(2e-3, epochs=5), keras_iris.losses.SFT())
history = model.fit(pairs, epochs=5, verbose=0)
[round(loss, 2) for loss in history.history["loss"]]

# %% [markdown]
# ## How good is it?
#
# Two scores of the words that are held out: the negative log-likelihood (NLL)
# of the annotated answers, in nats per token, and the share of words whose most
# likely answer is right. `KerasEngine` answers prompts; at temperature
# 0 it takes the most likely token each time.

# %%
ENGINE = {
    "end_token_ids": tokenizer.end_token_ids,
    "max_new_tokens": 8,
    "batch_size": 512,
    "bucket_lengths": [8],
}
right = [example.response_ids for example in held_out]
right_answers = [tokenizer.decode(response) for response in right]
scores, answers = {}, {}


def evaluate(name, model):
    pairs = keras_iris.data.PairDataset(held_out, right, **BATCHES)
    log_probs = model.predict(pairs, verbose=0)
    engine = keras_iris.generation.KerasEngine(
        model.causal_lm, temperature=0, **ENGINE
    )
    found = engine.generate(
        [example.prompt_ids for example in held_out], seed=0
    )
    answers[name] = [tokenizer.decode(answer.token_ids) for answer in found]
    nll = -log_probs[:, 0].sum() / sum(map(len, right))
    accuracy = np.mean(np.equal(answers[name], right_answers))
    scores[name] = f"NLL {nll:.3f}, accuracy {accuracy:.3f}"


evaluate("start", model)
scores

# %% [markdown]
# The control will start from the same weights, so it takes a copy of them
# before self-play changes them.

# %%
control = keras_iris.SelfPlayModel(make_causal_lm())
control.causal_lm.set_weights(causal_lm.get_weights())

# %% [markdown]
# ## Iteration 1: answer
#
# The model answers all training prompts. Each token is drawn from the model's
# own distribution, with no temperature and nothing cut off, because the loss
# compares this distribution with that of the data.

# %%
engine = keras_iris.generation.KerasEngine(causal_lm, **ENGINE)
prompts = [example.prompt_ids for example in train]


def draw_answers(iteration):
    found = engine.generate(prompts, seed=iteration)
    return [np.array(answer.token_ids) for answer in found]


synthetic = draw_answers(iteration=1)
for example, own in zip(train[:3], synthetic, strict=False):
    print(tokenizer.decode(example.prompt_ids))
    print("  annotated:", tokenizer.decode(example.response_ids))
    print("  synthetic:", tokenizer.decode(own))

# %% [markdown]
# ## Iteration 1: score
#
# The model as it is now is the opponent of the model in training. What is
# needed of it are its log-probabilities of both answers: `model.predict`. They
# are stored, so there is never a second model in memory.

# %%
pairs = keras_iris.data.PairDataset(train, synthetic, **BATCHES)
opponent = model.predict(pairs, verbose=0)
opponent[:3]

# %% [markdown]
# ## Iteration 1: train
#
# The IRIS loss looks at log-ratios: the log-probability of an answer now, minus
# that under the opponent. It raises those of annotated answers and lowers those
# of synthetic ones. Its order alpha says how unequally the answers of a batch
# count: at alpha 1 all annotated answers count alike, above 1 those with a
# large log-ratio count more.
#
# `AlphaScheduler` sets alpha to 1 + 0.5 gap. The gap says how far the data are
# from the model's answers: a lower bound of a divergence (Rényi's of order 2),
# in nats, and 0 if the two can't be told apart. Then it lowers alpha where a
# few answers would outweigh the rest of their batch.
#
# `self_play_metrics()` are the values that a run is judged by. A callback keeps
# them, for the curves below.

# %%
model.compile(
    make_optimizer(1e-4, epochs=2),
    keras_iris.losses.IRIS(),
    metrics=keras_iris.metrics.self_play_metrics(),
)
steps = []
callbacks = [
    keras_iris.callbacks.AlphaScheduler(),
    keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(logs)
    ),
]
pairs = keras_iris.data.PairDataset(train, synthetic, opponent, **BATCHES)
history = model.fit(pairs, callbacks=callbacks, verbose=0)
# %% [markdown]
# ## Iteration 2
#
# The same again, with answers of the model as it is by now. The whole loop in
# one call is `keras_iris.SelfPlay`, with a folder from which it resumes after a
# crash.

# %%
for iteration in [2]:  # and so on
    synthetic = draw_answers(iteration)
    pairs = keras_iris.data.PairDataset(train, synthetic, **BATCHES)
    opponent = model.predict(pairs, verbose=0)
    pairs = keras_iris.data.PairDataset(train, synthetic, opponent, **BATCHES)
    model.fit(pairs, callbacks=callbacks, verbose=0)

evaluate("self-play", model)

# %% [markdown]
# ## Curves
#
# Iteration 2 begins at the grey line. Loss and NLLs are means over the batches
# of the iteration so far. The gap is estimated from its pairs so far: it isn't
# known at the first batch, and settles over the next ones. Alpha follows it.
# Where alpha dips for a moment, a few answers outweighed the rest of a batch.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
groups = [["loss"], ["alpha"], ["gap"], ["real_nll", "synthetic_nll"]]
for axis, names in zip(axes, groups, strict=True):
    for name in names:
        axis.plot([logs[name] for logs in steps], label=name)
    axis.axvline(len(steps) / 2, color="lightgrey", zorder=0)
    axis.set_xlabel("step")
    axis.legend()

# %% [markdown]
# ## Was it worth it?
#
# The control goes on with SFT, on the same words and for as many steps, with
# the same learning rate.

# %%
control.compile(make_optimizer(1e-4, epochs=2), keras_iris.losses.SFT())
control.fit(pairs, epochs=2, verbose=0)
evaluate("control", control)
scores

# %% [markdown]
# Self-play made the model better than it was at the start, and more SFT made
# the NLL lower still. Without the control it would look like a success. It is
# one run of a tiny model on little data; what it shows is the method, not what
# the method is worth on another problem.
#
# Last, the first two held-out words whose answer self-play changed:

# %%
changed = [
    i
    for i, answer in enumerate(answers["start"])
    if answer != answers["self-play"][i]
]
for i in changed[:2]:
    print(tokenizer.decode(held_out[i].prompt_ids), right_answers[i])
    print("  before:", answers["start"][i])
    print("  after: ", answers["self-play"][i])
