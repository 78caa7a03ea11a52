"""IRIS on Qwen2.5-3B-Instruct, in the setting of the paper.

    export KERAS_BACKEND=jax
    python recipes/qwen2_5_3b.py --dry-run            # checks and estimates
    python recipes/qwen2_5_3b.py --lora-rank 16       # one 80 GB GPU
    python recipes/qwen2_5_3b.py --shard 8            # all weights, 8 GPUs

First turns of UltraChat, 50,000 prompts, 5 iterations of 2 epochs, batches of
64 pairs, a cosine schedule with 10% warm-up, at most 2,048 tokens. Learning
rate and optimizer are not in what we know of the paper: they are SPACE's.
`--preset FOLDER --data FILE.jsonl` takes your own. Run again, it takes up a
run that was cut off.

Memory of a device, estimated by the dry run:

    LoRA of rank 16               39 GiB
    all weights                   79 GiB
    all weights, on 8 devices     11 GiB

Not measured: anything with the real weights, be it memory, time or scores.
Random weights of this shape with LoRA took 17.2 GB on an H200. Tested on a
CPU: the recipe from end to end on a tiny checkpoint (`tests/test_recipes.py`).
"""

import argparse
import shlex
from pathlib import Path

import keras

import keras_iris
from keras_iris.distribution import ShardedParallel

PRESET = "hf://Qwen/Qwen2.5-3B-Instruct"
TEMPLATE = "chatml"  # where the checkpoint has none
FULL_RATE, LORA_RATE = 5e-7, 5e-6
SMALL = 64  # rows that the dry run reads


def read_options(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name, default, text="", **options):
        if default is not None and "action" not in options:
            options.setdefault("type", type(default))
            text = f"{text} (default: {default})".strip()
        parser.add_argument(name, default=default, help=text, **options)

    add("--preset", PRESET, "hf://org/name, hf://org/name@revision or a folder")
    add("--data", "HuggingFaceH4/ultrachat_200k", "a dataset's id, or a file")
    add("--split", "train_sft", "of a dataset with an id")
    add("--run-dir", None, "(default: runs/ and the preset's name)")
    add("--max-prompts", 50_000)
    add("--held-out", 500, "conversations to evaluate on")
    add("--iterations", 5)
    add("--epochs", 2, "of an iteration")
    add("--batch-size", 64, "pairs")
    add("--micro-batch-size", 8, "pairs at a time")
    add("--max-length", 2048, "tokens, half of them the prompt's")
    add("--max-new-tokens", 256)
    add("--num-samples", 1, "answers to a prompt, each in a pair of a batch")
    rates = f"(default: {FULL_RATE}, with LoRA {LORA_RATE})"
    add("--learning-rate", None, rates, type=float)
    add("--lora-rank", None, "(default: all weights are trained)", type=int)
    add("--quantize", None, "the base of LoRA", choices=("int8", "int4"))
    add("--shard", 1, "number of devices to cut everything over (JAX)")
    add(
        "--serve",
        None,
        "command of a server that answers the prompts, such as 'vllm serve "
        "{folder} --port {port}' (default: Keras generates)",
    )
    add("--in-flight", 256, "prompts that a server has at once")
    add(
        "--dry-run", False, "check and estimate, then stop", action="store_true"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Trains, exports the model and writes the report."""
    options = read_options(arguments)
    is_lora = options.lora_rank is not None
    run_dir = Path(options.run_dir or f"runs/{Path(options.preset).name}")
    template = keras_iris.data.ChatTemplate.named(TEMPLATE)
    lengths = {
        "max_prompt_length": options.max_length // 2,
        "max_response_length": options.max_length // 2,
    }

    # Data: the first question of each conversation, and its answer.
    conversations = [
        conversation.first_turn()
        for conversation in keras_iris.data.load_dataset(
            options.data,
            split=options.split,
            num_prompts=SMALL if options.dry_run else options.max_prompts,
            streaming=options.dry_run and not Path(options.data).exists(),
        )
    ]
    if options.dry_run:
        estimate = keras_iris.estimate(
            options.preset,
            conversations,
            default_template=template,
            num_prompts=options.max_prompts,
            new_tokens=options.max_new_tokens,
            num_samples=options.num_samples,
            iterations=options.iterations,
            epochs=options.epochs,
            micro_batch_size=options.micro_batch_size,
            lora_rank=options.lora_rank,
            quantize=options.quantize,
            num_devices=options.shard,
            needs_folder=options.serve is not None,
            **lengths,
        )
        print(estimate)
        return

    # Model: bfloat16 products; all that is trained is float32.
    keras.utils.set_random_seed(0)
    if options.shard > 1:
        keras.distribution.set_distribution(ShardedParallel(options.shard))
    causal_lm = keras_iris.load(
        options.preset,
        dtype="bfloat16" if is_lora else "mixed_bfloat16",
        lora_rank=options.lora_rank,
        quantize=options.quantize,
        remat=True,
        default_template=template,
    )
    tokenizer = causal_lm.tokenizer
    examples = keras_iris.data.tokenize(
        conversations,
        tokenizer,
        template=causal_lm.chat_template,
        cache_dir=run_dir / "tokens",
        **lengths,
    )
    held_out, examples = (
        examples[: options.held_out],
        examples[options.held_out :],
    )
    num_pairs = len(examples) * options.num_samples
    num_batches = num_pairs // options.batch_size
    num_steps = num_batches * options.epochs * options.iterations
    if num_steps == 0 or not held_out:
        raise SystemExit(
            f"The data have {len(held_out)} held-out and {len(examples)} other "
            "examples. Expected at least 1 and "
            f"{options.batch_size // options.num_samples}. Lower "
            "--held-out or --batch-size, or add rows."
        )

    # Training: cosine with 10% warm-up, the order follows the gap.
    rate = options.learning_rate or (LORA_RATE if is_lora else FULL_RATE)
    warm_up_steps = num_steps // 10
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.RMSprop(
            keras.optimizers.schedules.CosineDecay(
                0.0 if warm_up_steps else rate,
                decay_steps=num_steps - warm_up_steps,
                warmup_target=rate if warm_up_steps else None,
                warmup_steps=warm_up_steps,
            )
        ),
        loss=keras_iris.losses.IRIS(),
        micro_batch_size=options.micro_batch_size,
    )
    engine = None
    if options.serve:
        engine = keras_iris.generation.ServerEngine(
            command=shlex.split(options.serve),
            end_token_ids=tokenizer.end_token_ids,
            max_new_tokens=options.max_new_tokens,
            concurrency=options.in_flight,
        )
    self_play = keras_iris.SelfPlay(
        model,
        examples[: num_batches * options.batch_size // options.num_samples],
        run_dir,
        iterations=options.iterations,
        epochs=options.epochs,
        batch_size=options.batch_size,
        num_samples=options.num_samples,
        max_response_length=options.max_new_tokens,
        tokenizer=tokenizer,
        engine=engine,
        evaluate=keras_iris.models.HeldOutNLL(
            held_out, batch_size=options.micro_batch_size
        ),
        callbacks=[keras_iris.callbacks.AlphaScheduler()],
        title=f"IRIS on {Path(options.preset).name}",
    )
    self_play.run()
    print("Model:", keras_iris.export(causal_lm, run_dir / "model"))
    print("Report:", keras_iris.evaluation.report(run_dir))
    print(keras_iris.evaluation.scores_table(run_dir))


if __name__ == "__main__":
    main()
