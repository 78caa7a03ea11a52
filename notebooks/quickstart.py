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

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # KerasHub imports it

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np

import keras_iris

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
# takes a prompt with two answers, an annotated one and one of the model's own
# (a synthetic one). It predicts the log-probability of each, in nats.


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
# no synthetic answers yet, so the annotated ones stand in their place, and the
# loss ignores them.
#
# `PairDataset` shuffles and pads; hence `shuffle=False` in `fit`. Here every
# batch has one length, 16 tokens, so that one step is compiled and no more.

# %%
BATCH = {"batch_size": 64, "bucket_lengths": [16]}


def make_optimizer(learning_rate, epochs):
    steps = epochs * len(train) // BATCH["batch_size"]
    schedule = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
    return keras.optimizers.AdamW(schedule)


annotated = [example.response_ids for example in train]
pairs = keras_iris.data.PairDataset(train, annotated, **BATCH)
model.compile(make_optimizer(2e-3, epochs=6), keras_iris.losses.SFT())
history = model.fit(pairs, epochs=6, shuffle=False, verbose=0)
history.history["loss"]

# %% [markdown]
# ## How good is it?
#
# Two scores of the words that were held out: the negative log-likelihood (NLL)
# of the annotated answers, in nats per token, and the share of words whose most
# likely answer is right. `KerasEngine` answers prompts; with a `GreedySampler`
# it takes the most likely token each time.

# %%
ENGINE = {
    "end_token_ids": tokenizer.end_token_ids,
    "max_new_tokens": 8,
    "batch_size": 512,
    "bucket_lengths": [8],
}


def answer(causal_lm):
    engine = keras_iris.generation.KerasEngine(
        causal_lm, sampler=keras_hub.samplers.GreedySampler(), **ENGINE
    )
    prompts = [example.prompt_ids for example in held_out]
    answers = engine.generate(prompts, seed=0)
    return [tokenizer.decode(answer.token_ids) for answer in answers]


def evaluate(model):
    responses = [example.response_ids for example in held_out]
    log_probs = keras_iris.models.score_pairs(
        model, held_out, responses, **BATCH
    )
    right = [tokenizer.decode(response) for response in responses]
    return {
        "NLL": -log_probs[:, 0].sum() / sum(map(len, responses)),
        "accuracy": np.mean(np.equal(answer(model.causal_lm), right)),
    }


scores = {"SFT": evaluate(model)}
before = answer(causal_lm)
scores

# %% [markdown]
# The control starts from the same weights. It gets a copy of them before
# self-play changes them.

# %%
control = keras_iris.SelfPlayModel(make_causal_lm())
control.causal_lm.set_weights(causal_lm.get_weights())

# %% [markdown]
# ## Iteration 1: answer
#
# The model answers all training prompts. Each token is drawn from the model's
# own distribution: no temperature, nothing cut off. The answers have to be
# samples of the model, because the loss compares the model's distribution with
# that of the data.

# %%
engine = keras_iris.generation.KerasEngine(causal_lm, **ENGINE)
prompts = [example.prompt_ids for example in train]


def draw_answers(iteration):
    answers = engine.generate(prompts, seed=iteration)
    return [np.array(answer.token_ids) for answer in answers]


synthetic = draw_answers(iteration=1)
for example, own in zip(train[:4], synthetic, strict=False):
    print(tokenizer.decode(example.prompt_ids))
    print("  annotated:", tokenizer.decode(example.response_ids))
    print("  synthetic:", tokenizer.decode(own))

# %% [markdown]
# ## Iteration 1: score
#
# The opponent is the model as it is now. Its log-probabilities of both answers
# are what the model will be compared with, so they are stored, and no second
# copy of the model is needed. `score_pairs` is `model.predict` in the order of
# the examples.

# %%
opponent = keras_iris.models.score_pairs(model, train, synthetic, **BATCH)
pairs = keras_iris.data.PairDataset(train, synthetic, opponent, **BATCH)
opponent[:4]

# %% [markdown]
# ## Iteration 1: train
#
# The IRIS loss takes the log-ratio of each answer: its log-probability now
# minus that under the opponent. It raises log-ratios of annotated answers and
# lowers those of synthetic ones. Its order alpha says how unequally the answers
# of a batch count. At alpha 1 the annotated answers count alike; above 1 those
# count more whose log-ratio is large.
#
# `AlphaScheduler` sets alpha from the gap between the data and the model's
# answers: alpha = 1 + 0.5 gap. The gap is a lower bound of a divergence (that
# of Rényi, of order 2) in nats: 0 if the two can't be told apart. Then it
# lowers alpha where a few answers would outweigh all others of the batch.
#
# `self_play_metrics()` are the values that a run is judged by.

# %%
model.compile(
    make_optimizer(1e-4, epochs=4),
    keras_iris.losses.IRIS(),
    metrics=keras_iris.metrics.self_play_metrics(),
)
scheduler = keras_iris.callbacks.AlphaScheduler()
steps = []
record = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda batch, logs: steps.append(logs)
)


def fit(pairs):
    model.fit(
        pairs,
        epochs=2,
        shuffle=False,
        callbacks=[scheduler, record],
        verbose=0,
    )


fit(pairs)

# %% [markdown]
# ## Iterations 2 and 3
#
# The same again, with answers of the model as it is by then. `SelfPlay` is this
# loop in one call, with a folder that a run can be resumed from.

# %%
for iteration in [2]:
    synthetic = draw_answers(iteration)
    opponent = keras_iris.models.score_pairs(model, train, synthetic, **BATCH)
    fit(keras_iris.data.PairDataset(train, synthetic, opponent, **BATCH))

scores["self-play"] = evaluate(model)

# %% [markdown]
# ## Curves
#
# Keras' logs are means over the epoch so far, so they start anew 6 times. The
# lines between are the starts of iterations.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
names = ["loss", "alpha", "gap", ("real_nll", "synthetic_nll")]
for axis, group in zip(axes, names, strict=True):
    for name in [group] if isinstance(group, str) else group:
        axis.plot([values[name] for values in steps], label=name)
    for start in [64]:
        axis.axvline(start, color="lightgrey", zorder=0)
    axis.set_xlabel("step")
    axis.legend()

# %% [markdown]
# ## Was it worth it?
#
# The control goes on with SFT for the same number of steps, with the same
# learning rate, on the same words.

# %%
control.compile(make_optimizer(1e-4, epochs=4), keras_iris.losses.SFT())
control.fit(pairs, epochs=4, shuffle=False, verbose=0)
scores["control"] = evaluate(control)

for name, values in scores.items():
    print(f"{name:10}", {k: round(float(v), 3) for k, v in values.items()})

# %% [markdown]
# HONEST
#
# Two words that were held out, before and after self-play:

# %%
after = answer(causal_lm)
for i in (0, 1):
    print(tokenizer.decode(held_out[i].prompt_ids))
    print("  annotated:", tokenizer.decode(held_out[i].response_ids))
    print("  before:   ", before[i])
    print("  after:    ", after[i])
