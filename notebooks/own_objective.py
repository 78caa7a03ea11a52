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
# # An objective and an engine of your own
#
# `SelfPlayModel` trains with any `SelfPlayLoss`, and `SelfPlay` draws answers
# from any `Engine`. Both are small classes. This notebook writes one of each,
# checks them, and trains with them on the CMU Pronouncing Dictionary. It takes
# about a minute on two CPU cores.
#
# The first cell chooses Keras' backend: `"jax"`, `"tensorflow"` or `"torch"`.
# It has to come before Keras is imported. In a hosted notebook install the
# package first.

# %%
import contextlib
import io
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras_iris
import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from keras import ops
from keras_iris.generation import Completion, Engine
from keras_iris.losses import Risk, SelfPlayLoss

keras.utils.set_random_seed(0)

# %% [markdown]
# ## An objective
#
# An objective gets two tensors of shape `(batch, 2)`: the opponent's and the
# policy's log-probabilities of the annotated and of the synthetic answer, in
# nats. It says which risks it is the sum of. A risk has a value for each pair,
# a tilt (0 for a plain mean), and a weight.
#
# The one below is a hinge: a pair costs nothing once the log-ratio of the
# annotated answer is above that of the synthetic one by a margin. A decorator
# of Keras lets models that are compiled with it be saved and loaded.


# %%
@keras.saving.register_keras_serializable(package="notebook")
class Hinge(SelfPlayLoss):
    """`max(0, margin - (r(y) - r(y')))`, with log-ratios `r` in nats."""

    def __init__(self, margin=1.0, *, sft_weight=0.0, name="hinge"):
        super().__init__(name, sft_weight=sft_weight)
        self.margin = margin

    def risks(self, y_true, y_pred):
        log_ratio = y_pred - y_true
        difference = log_ratio[:, 0] - log_ratio[:, 1]
        return [Risk(ops.relu(self.margin - difference))]

    def get_config(self):
        return {"margin": self.margin, **super().get_config()}


opponent = np.array([[-3.0, -2.0], [-4.0, -5.0]], "float32")
policy = opponent + np.array([[0.5, -0.2], [2.0, 0.0]], "float32")
by_hand = np.mean([1.0 - 0.7, 0.0])
float(Hinge()(opponent, policy)), float(by_hand)

# %% [markdown]
# ## The problem
#
# A prompt is a word, letter by letter, and its annotated answer the phonemes.

# %%
words = [
    (word, phonemes)
    for word, phonemes in keras_iris.data.cmudict()
    if word.isalpha() and 3 <= len(word) <= 5 and len(phonemes) <= 5
]
letters = sorted({letter for word, _ in words for letter in word})
phonemes = sorted({phoneme for _, answer in words for phoneme in answer})
tokenizer = keras_iris.data.SymbolTokenizer([*letters, "=>", *phonemes])
rows = [
    {
        "prompt": " ".join(words[i][0]) + " =>",
        "response": " ".join(words[i][1]),
    }
    for i in np.random.default_rng(0).permutation(len(words))[:640]
]
examples = keras_iris.data.tokenize(
    keras_iris.data.read_conversations(rows),
    tokenizer,
    max_prompt_length=6,
    max_response_length=6,
)
train, held_out = examples[:512], examples[512:]

backbone = keras_hub.models.QwenBackbone(
    vocabulary_size=tokenizer.vocabulary_size,
    num_layers=1,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=64,
    intermediate_dim=128,
    tie_word_embeddings=True,
)
causal_lm = keras_hub.models.QwenCausalLM(backbone=backbone, preprocessor=None)
model = keras_iris.SelfPlayModel(causal_lm)

# %% [markdown]
# Self-play goes on from a fine-tuned model, so first some epochs of SFT.

# %%
annotated = [example.response_ids for example in train]
pairs = keras_iris.data.PairDataset(
    train, annotated, batch_size=32, bucket_lengths=[12]
)
model.compile(keras.optimizers.AdamW(5e-3), keras_iris.losses.SFT())
history = model.fit(pairs, epochs=10, verbose=0)
round(history.history["loss"][-1], 2)

# %% [markdown]
# ## An engine
#
# An engine has one method: prompts in, completions out, all of them token ids.
# A completion has every id that was drawn, the end token included, and if the
# engine knows them the ids' log-probabilities. What it draws has to be the
# model's own distribution, at temperature 1, with nothing cut off.
#
# The engine below draws token after token with NumPy from the model's logits.
# `KerasEngine`, which is what `SelfPlay` takes by default, keeps keys and
# values instead of computing them again, and is much faster.


# %%
class PlainEngine(Engine):
    """Draws answers token by token, all prompts at once.

    Args:
        causal_lm: The model.
        end_token_id: Where an answer ends.
        max_new_tokens: Most tokens of an answer.
    """

    def __init__(self, causal_lm, end_token_id, max_new_tokens):
        # Log-probabilities at every position, compiled once.
        logits = ops.log_softmax(causal_lm.output)
        self.network = keras.Model(causal_lm.input, logits)
        self.end = end_token_id
        self.max_new_tokens = max_new_tokens

    def generate(self, prompts, *, seed):
        rng = np.random.default_rng(seed)
        lengths = np.array([len(prompt) for prompt in prompts])
        rows = np.arange(len(prompts))
        ids = np.zeros((len(prompts), 12), "int32")
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        drawn = [[] for _ in prompts]
        log_probs = [[] for _ in prompts]
        for _ in range(self.max_new_tokens):
            mask = np.arange(ids.shape[1]) < lengths[:, None]
            predicted = self.network.predict_on_batch(
                {"token_ids": ids, "padding_mask": mask.astype("int32")}
            )
            last = np.asarray(predicted)[rows, lengths - 1]
            # The largest of logits and Gumbel noise is a draw.
            new = np.argmax(last + rng.gumbel(size=last.shape), axis=1)
            for row, token in enumerate(new.tolist()):
                if self.end not in drawn[row]:
                    drawn[row].append(token)
                    log_probs[row].append(last[row, token])
                    ids[row, lengths[row]] = token
                    lengths[row] += 1
        return [
            Completion(
                tuple(tokens),
                "stop" if tokens[-1] == self.end else "length",
                np.array(values, "float32"),
            )
            for tokens, values in zip(drawn, log_probs, strict=True)
        ]


(end_token_id,) = tokenizer.end_token_ids
engine = PlainEngine(causal_lm, end_token_id, max_new_tokens=6)
for completion in engine.generate([train[0].prompt_ids] * 3, seed=0):
    print(tokenizer.decode(completion.token_ids), completion.finish_reason)

# %% [markdown]
# ## Both in a run
#
# `SelfPlay` compares the engine's log-probabilities with those of the model in
# training, and stops with an error where they are of another model. The
# control is SFT with the same steps from the same start. What a run prints on
# its way is left out here.

# %%
run_dir = tempfile.mkdtemp()
model.compile(keras.optimizers.AdamW(1e-3), Hinge(margin=2.0))
self_play = keras_iris.SelfPlay(
    model,
    train,
    run_dir,
    iterations=2,
    epochs=1,
    batch_size=32,
    max_response_length=6,
    tokenizer=tokenizer,
    engine=engine,
    evaluate=keras_iris.evaluation.HeldOut(
        held_out, batch_size=64, max_new_tokens=6
    ),
    control="sft",
)
with contextlib.redirect_stdout(io.StringIO()):
    self_play.run()
print(keras_iris.evaluation.scores_table(run_dir))

# %% [markdown]
# The margin of the hinge, as the run has logged it. Each iteration begins at 0:
# there the policy is the opponent.

# %%
lines = keras_iris.evaluation.read_metrics(run_dir)
steps = [line for line in lines if line["kind"] == "step"]
figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
for iteration in (1, 2):
    part = [line for line in steps if line["iteration"] == iteration]
    axis.plot(
        [line["step"] for line in part], [line["margin"] for line in part]
    )
_ = axis.set(xlabel="step", ylabel="mean margin, nats")
