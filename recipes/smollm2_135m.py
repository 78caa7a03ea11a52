r"""IRIS on SmolLM2-135M-Instruct, on a laptop's CPU, with your own data.

    python recipes/smollm2_135m.py --data data.jsonl --small
    python recipes/smollm2_135m.py --data data.jsonl

`data.jsonl` has a conversation a line: {"prompt", "response"}, or {"messages":
[{"role", "content"}, ...]}. LoRA adapters are trained on it in
iterations of IRIS with the adaptive order; answers to held-out prompts are
printed before and after, and the result is exported to RUN_DIR/model. Run
again, it takes up a run that was cut off.

Hardware: 2 CPU cores and 8 GB of memory (7.8 GB seen, on JAX).
Measured on JAX with SmolLM2 out of a package (`python tests/make_smollm2.py`):

    python recipes/smollm2_135m.py --preset .smollm2/SmolLM2-135M-Instruct \
        --data chats.jsonl --small

with `chats.jsonl` of docs/howto/data.md: the NLL of 20 held-out responses went
from 4.781 to 4.304 nats a token. It took 430 seconds of CPU time; 2,196 seconds
by the clock, as four to ten other jobs ran on the same two cores. There was no
control: SFT may do as well. The whole run isn't measured.
"""

import argparse
import time
from pathlib import Path

import keras_iris
import keras

PRESET = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_SAMPLES = 4
NUM_HELD_OUT = 32
BATCH_SIZE = 16
EPOCHS = 2
LORA_RANK = 16
MAX_PROMPT_LENGTH = 64  # tokens
MAX_RESPONSE_LENGTH = 32


def read_options(arguments):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default=PRESET, help="a folder or hf://org/name")
    add("--data", required=True, help=".jsonl or .parquet")
    add("--run-dir", help="if None, runs/ and the preset's name")
    add("--prompts", type=int, default=512, help="drawn from the data")
    add("--iterations", type=int, default=3, help="of self-play")
    add("--num-samples", type=int, default=1, help="answers to a prompt")
    add("--learning-rate", type=float, default=3e-4)
    small = "96 prompts, 1 iteration, a learning rate of 1e-3"
    add("--small", action="store_true", help=small)
    options = parser.parse_args(arguments)
    if options.small:
        options.prompts, options.iterations = 96, 1
        options.learning_rate = 1e-3
    return options


def tokenize(conversations, causal_lm):
    """Examples of the lengths of this recipe."""
    return keras_iris.data.tokenize(
        conversations,
        causal_lm.tokenizer,
        template=causal_lm.chat_template,
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_response_length=MAX_RESPONSE_LENGTH,
    )


def main(arguments=None):
    """Trains, and prints answers before and after each iteration."""
    start = time.perf_counter()
    options = read_options(arguments)
    run_dir = Path(options.run_dir or f"runs/{Path(options.preset).name}")
    keras.utils.set_random_seed(0)
    conversations = keras_iris.data.load_dataset(
        options.data, num_prompts=options.prompts + NUM_HELD_OUT
    )
    causal_lm = keras_iris.load(options.preset, lora_rank=LORA_RANK)
    held_out = tokenize(conversations[:NUM_HELD_OUT], causal_lm)
    examples = tokenize(conversations[NUM_HELD_OUT:], causal_lm)

    model = keras_iris.SelfPlayModel(causal_lm)
    num_pairs = len(examples) * options.num_samples
    steps = options.iterations * EPOCHS * -(-num_pairs // BATCH_SIZE)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(options.learning_rate, steps)
        ),
        loss=keras_iris.losses.IRIS(),
    )
    keras_iris.SelfPlay(
        model,
        examples,
        run_dir,
        iterations=options.iterations,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        num_samples=options.num_samples,
        max_prompt_length=MAX_PROMPT_LENGTH,
        max_response_length=MAX_RESPONSE_LENGTH,
        callbacks=[keras_iris.callbacks.AlphaScheduler()],
        evaluate=keras_iris.evaluation.HeldOut(
            held_out,
            batch_size=BATCH_SIZE,
            samples=NUM_SAMPLES,
            max_new_tokens=MAX_RESPONSE_LENGTH,
        ),
        title="IRIS on SmolLM2-135M-Instruct",
    ).run()

    print(keras_iris.evaluation.samples(run_dir))
    print("\nModel:", keras_iris.export(causal_lm, run_dir / "model"))
    print("Report:", keras_iris.evaluation.report(run_dir))
    print(f"{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
