"""IRIS on Zephyr-7B, from its SFT checkpoint, in the setting of the paper.

    export KERAS_BACKEND=jax
    python recipes/zephyr_7b.py --dry-run            # checks and estimates
    python recipes/zephyr_7b.py --lora-rank 16 --micro-batch-size 4
    python recipes/zephyr_7b.py --mesh data=8        # all weights, 8 GPUs

`--preset FOLDER --data FILE.jsonl` takes your own. Run again, it takes up a run
that was cut off. Learning rate and optimizer are SPACE's: what we know of the
paper doesn't say.

Memory of a device, estimated by the dry run; LoRA on one 80 GB GPU needs
micro-batches of 4 pairs:

    LoRA of rank 16               77 GiB
    LoRA, int8 base               64 GiB
    all weights, on 8 devices     22 GiB

Not measured: anything with the real weights. Tested on a CPU with a tiny
checkpoint (`tests/test_recipes.py`). Others report that SPIN gains from one
revision of the start checkpoint only (SPIN's issue 36); which one isn't known
to us, so none is pinned: `hf://alignment-handbook/zephyr-7b-sft-full@REVISION`.
"""

import argparse
import math
import shlex
from pathlib import Path

import keras_iris
import keras
from keras_iris.distribution import make_distribution, read_mesh

PRESET = "hf://alignment-handbook/zephyr-7b-sft-full"
DATA = "HuggingFaceH4/ultrachat_200k"
TEMPLATE = "zephyr"  # where the checkpoint has none
RATE, LORA_RATE = 5e-7, 5e-6

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
add = parser.add_argument
add("--preset", default=PRESET, help="a folder or hf://org/name@revision")
add("--data", default=DATA, help="a dataset's id, or a file")
add("--run-dir", help="if None, runs/ and the preset's name")
add("--max-prompts", type=int, default=50_000, help="drawn from the data")
add("--held-out", type=int, default=500, help="of them, to evaluate on")
add("--iterations", type=int, default=5, help="of self-play")
add("--epochs", type=int, default=2, help="of an iteration")
add("--batch-size", type=int, default=64, help="pairs")
add("--micro-batch-size", type=int, default=8, help="pairs at a time")
add("--max-length", type=int, default=2048, help="tokens, half a prompt's")
add("--max-new-tokens", type=int, default=256, help="of an answer")
add("--num-samples", type=int, default=1, help="answers to a prompt")
add("--learning-rate", type=float, help=f"{RATE}, or {LORA_RATE} with LoRA")
add("--lora-rank", type=int, help="if None, all weights are trained")
add("--quantize", choices=("int8", "int4"), help="the base of LoRA")
add("--mesh", type=read_mesh, help="auto, data=8 or data=2,model=4 (JAX)")
add("--strategy", choices=("fsdp", "2d", "data"), default="fsdp")
add("--serve", help="'vllm serve {folder} --port {port}', else Keras answers")
add("--in-flight", type=int, default=256, help="prompts that a server has")
add("--dry-run", action="store_true", help="only check and estimate")


def main(arguments=None):
    """Trains, exports the model and writes the report."""
    options = parser.parse_args(arguments)
    if options.quantize and options.lora_rank is None:
        parser.error("--quantize is for the base of LoRA: add --lora-rank")
    run_dir = Path(options.run_dir or f"runs/{Path(options.preset).name}")
    half = options.max_length // 2
    lengths = {"max_prompt_length": half, "max_response_length": half}
    loop = {
        "iterations": options.iterations,
        "epochs": options.epochs,
        "num_samples": options.num_samples,
    }
    model_options = {
        # Products in bfloat16; all that is trained is float32.
        "dtype": "bfloat16" if options.lora_rank else "mixed_bfloat16",
        "lora_rank": options.lora_rank,
        "quantize": options.quantize,
    }
    template = keras_iris.data.ChatTemplate.named(TEMPLATE)

    # Data: the first question of each conversation, and its answer.
    rows = keras_iris.data.load_dataset(
        options.data,
        split="train_sft",
        num_prompts=64 if options.dry_run else options.max_prompts,
        streaming=options.dry_run and not Path(options.data).exists(),
    )
    conversations = [row.first_turn() for row in rows]
    if options.dry_run:
        estimate = keras_iris.estimate(
            options.preset,
            conversations,
            default_template=template,
            num_prompts=options.max_prompts,
            new_tokens=options.max_new_tokens,
            micro_batch_size=options.micro_batch_size,
            mesh=options.mesh,
            strategy=options.strategy,
            needs_folder=options.serve is not None,
            run_dir=run_dir,
            **lengths,
            **loop,
            **model_options,
        )
        print(estimate)
        return

    # Model, over several devices if there is a mesh.
    keras_iris.distribution.initialize()  # of several processes, if any
    keras.utils.set_random_seed(0)
    if options.mesh is not None:
        distribution = make_distribution(options.mesh, options.strategy)
        keras.distribution.set_distribution(distribution)
    causal_lm = keras_iris.load(
        options.preset, remat=True, default_template=template, **model_options
    )
    examples = keras_iris.data.tokenize(
        conversations,
        causal_lm.tokenizer,
        template=causal_lm.chat_template,
        cache_dir=run_dir / "tokens",
        **lengths,
    )
    n = options.held_out
    held_out, examples = examples[:n], examples[n:]

    # Training: cosine with 10% warm-up, the order follows the gap.
    num_pairs = len(examples) * options.num_samples
    num_batches = math.ceil(num_pairs / options.batch_size)
    num_steps = num_batches * options.epochs * options.iterations
    rate = options.learning_rate or (LORA_RATE if options.lora_rank else RATE)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=num_steps - num_steps // 10,
        warmup_target=rate,
        warmup_steps=num_steps // 10,
    )
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.RMSprop(schedule),
        loss=keras_iris.losses.IRIS(),
        micro_batch_size=options.micro_batch_size,
    )
    engine = options.serve and keras_iris.generation.ServerEngine(
        command=shlex.split(options.serve),
        end_token_ids=causal_lm.tokenizer.end_token_ids,
        max_new_tokens=options.max_new_tokens,
        concurrency=options.in_flight,
    )
    keras_iris.SelfPlay(
        model,
        examples,
        run_dir,
        batch_size=options.batch_size,
        max_response_length=options.max_new_tokens,
        engine=engine,
        evaluate=keras_iris.evaluation.HeldOut(
            held_out,
            batch_size=options.micro_batch_size,
            max_new_tokens=options.max_new_tokens,
        ),
        callbacks=[keras_iris.callbacks.AlphaScheduler()],
        title=f"IRIS on {Path(options.preset).name}",
        **loop,
    ).run()
    folder = keras_iris.export(causal_lm, run_dir / "model")
    if keras_iris.distribution.process_index() == 0:
        print("Model:", folder)
        print("Report:", keras_iris.evaluation.report(run_dir))
        print(keras_iris.evaluation.scores_table(run_dir))


if __name__ == "__main__":
    main()
