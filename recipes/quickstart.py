"""Self-play from scratch to plot: how English words are pronounced.

    make quickstart                       # JAX
    KERAS_BACKEND=torch make quickstart   # or tensorflow

A 0.3M-parameter decoder learns the CMU Pronouncing Dictionary from 13% of a
pool of words (SFT, learning rate annealed to zero). Then three iterations of
IRIS with the adaptive order go on from there on the same words, next to a
control that goes on with SFT for the same number of steps. Results come as a
table, and as `report.html` with plots in `runs/quickstart_jax` (or the other
backend); run again, it takes up a run that was cut off.

Hardware: 2 CPU cores. Time and results: see the README, measured.
"""

import hashlib
import time
from pathlib import Path

import keras_iris
import keras
import keras_hub
import numpy as np
from keras_iris.metrics import ExampleScore

RUN_DIR = Path(f"runs/quickstart_{keras.backend.backend()}")
POOL_SIZE = 16_000  # words
ANNOTATED_SHARE = 0.13
NUM_HELD_OUT = 500
BATCH_SIZE = 64
MAX_PHONEMES = 12  # with the end token
SFT_EPOCHS = 8
SFT_LEARNING_RATE = 2e-3
ITERATIONS = 3
EPOCHS = 2
LEARNING_RATE = 1e-4


def load_data(tokenizer):
    """Annotated training rows and held-out rows, from disjoint words."""
    words = [
        (word, phonemes)
        for word, phonemes in keras_iris.data.cmudict()
        if word.isalpha()
        and 3 <= len(word) <= 10
        and len(phonemes) < MAX_PHONEMES
    ]
    order = np.random.default_rng(0).permutation(len(words))
    rows = [
        {
            "prompt": " ".join(words[i][0]) + " =>",
            "response": " ".join(words[i][1]),
        }
        for i in order[: POOL_SIZE + NUM_HELD_OUT]
    ]
    examples = keras_iris.data.tokenize(
        keras_iris.data.read_conversations(rows),
        tokenizer,
        max_prompt_length=11,
        max_response_length=MAX_PHONEMES,
    )
    num_annotated = int(ANNOTATED_SHARE * POOL_SIZE)
    return examples[:num_annotated], examples[POOL_SIZE:]


def make_causal_lm(vocabulary_size):
    """A small decoder of the Qwen 2 architecture, not trained."""
    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=128,
        intermediate_dim=256,
        tie_word_embeddings=True,
    )
    return keras_hub.models.QwenCausalLM(backbone=backbone, preprocessor=None)


def fine_tune(causal_lm, examples, *, epochs, learning_rate, **fit_options):
    """SFT with Keras' own `fit`, learning rate annealed to zero."""
    responses = [example.response_ids for example in examples]
    pairs = keras_iris.data.pad_pairs(examples, responses, length=24)
    token_ids, padding_mask, response_mask = (
        pairs[name][:, 0]
        for name in ("token_ids", "padding_mask", "response_mask")
    )
    steps = epochs * -(-len(examples) // BATCH_SIZE)
    # Without KerasHub's preprocessing, which needs text and TensorFlow.
    network = keras.Model(causal_lm.inputs, causal_lm.outputs)
    network.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
    )
    network.fit(
        {
            "token_ids": token_ids[:, :-1],
            "padding_mask": padding_mask[:, :-1],
        },
        token_ids[:, 1:],
        sample_weight=response_mask[:, 1:].astype("float32"),
        batch_size=BATCH_SIZE,
        epochs=epochs,
        **fit_options,
    )


def sft_file():
    """Where the weights of SFT are kept: under other settings elsewhere."""
    settings = (
        POOL_SIZE,
        ANNOTATED_SHARE,
        BATCH_SIZE,
        MAX_PHONEMES,
        SFT_EPOCHS,
        SFT_LEARNING_RATE,
    )
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return RUN_DIR / f"sft_{name}.weights.h5"


def make_evaluate(causal_lm, held_out, tokenizer):
    """Held-out scores of a `SelfPlayModel` of this causal LM."""
    targets = [example.response_ids for example in held_out]
    num_tokens = [len(target) for target in targets]
    likelihood = keras_iris.evaluation.HeldOut(
        held_out, batch_size=250, max_new_tokens=MAX_PHONEMES
    )
    greedy = keras_iris.generation.KerasEngine(
        causal_lm,
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=MAX_PHONEMES,
        batch_size=250,
        temperature=0,
    )

    def evaluate(model):
        answers = greedy.generate([e.prompt_ids for e in held_out], seed=0)
        errors = [
            edit_distance(answer.token_ids, target)
            for answer, target in zip(answers, targets, strict=True)
        ]
        scores = likelihood(model)
        # The end token is in both, and counts as a phoneme.
        scores["phoneme_error_rate"] = ExampleScore(errors, num_tokens)
        scores["word_accuracy"] = ExampleScore([e == 0 for e in errors])
        return scores

    return evaluate


def edit_distance(left, right):
    """Insertions, deletions and substitutions from `left` to `right`."""
    costs = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, costs[0] = costs[0], i
        for j, b in enumerate(right, 1):
            previous, costs[j] = (
                costs[j],
                min(costs[j] + 1, costs[j - 1] + 1, previous + (a != b)),
            )
    return costs[-1]


def main():
    """Runs SFT, self-play and the control, then writes the report."""
    start = time.perf_counter()
    keras.utils.set_random_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    phonemes = sorted(
        {p for _, word in keras_iris.data.cmudict() for p in word}
    )
    tokenizer = keras_iris.data.SymbolTokenizer([*letters, "=>", *phonemes])
    train, held_out = load_data(tokenizer)

    print(f"SFT on {len(train)} words, {len(held_out)} held out")
    causal_lm = make_causal_lm(tokenizer.vocabulary_size)
    sft_weights = sft_file()
    if sft_weights.exists():
        causal_lm.load_weights(sft_weights)
    else:
        fine_tune(
            causal_lm,
            train,
            epochs=SFT_EPOCHS,
            learning_rate=SFT_LEARNING_RATE,
            verbose=2,
        )
        RUN_DIR.mkdir(parents=True, exist_ok=True)
        # Under its name only when it is whole.
        partial = RUN_DIR / "partial.weights.h5"
        causal_lm.save_weights(partial)
        partial.replace(sft_weights)

    model = keras_iris.SelfPlayModel(causal_lm)
    steps = ITERATIONS * EPOCHS * -(-len(train) // BATCH_SIZE)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
        ),
        loss=keras_iris.losses.IRIS(),
    )
    self_play = keras_iris.SelfPlay(
        model,
        train,
        RUN_DIR,
        iterations=ITERATIONS,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        max_response_length=MAX_PHONEMES,
        tokenizer=tokenizer,
        callbacks=[keras_iris.callbacks.AlphaScheduler()],
        evaluate=make_evaluate(causal_lm, held_out, tokenizer),
        control="sft",
        title="IRIS on the CMU Pronouncing Dictionary",
    )
    self_play.run()

    report = keras_iris.evaluation.report(RUN_DIR)
    print(keras_iris.evaluation.scores_table(RUN_DIR))
    print(f"{time.perf_counter() - start:.0f} seconds. Report: {report}")


if __name__ == "__main__":
    main()
