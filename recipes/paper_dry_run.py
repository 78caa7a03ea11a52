"""The dry run of `zephyr_7b.py` and `qwen2_5_3b.py`: checks and estimates."""

import itertools
import shutil
from pathlib import Path

import numpy as np
from paper_options import (
    GENERATION_BATCH_SIZE,
    LOSSES,
    length_limits,
    split,
)

import keras_iris
from keras_iris.distribution import RunEstimate

NUM_CHECKED_ROWS = 64


def dry_run(options, template_name):
    """Checks what can be checked without weights, and prints estimates."""
    config, tokenizer, template = keras_iris.hub.inspect(
        options.preset,
        default_template=keras_iris.data.ChatTemplate.named(template_name),
    )
    template.check()
    conversations, num_rows = read_few_rows(options)
    examples = keras_iris.data.tokenize(
        conversations, tokenizer, template=template, **length_limits(options)
    )
    # Those that are left out for their length are known of these rows only.
    num_prompts = num_rows - len(conversations) + len(examples)
    split(range(num_prompts), options)
    first = examples[0]
    print(f"A prompt:\n{tokenizer.decode(first.prompt_ids)}")
    print(f"Its response:\n{tokenizer.decode(first.response_ids)}")

    estimate = RunEstimate(
        config=config,
        num_prompts=num_prompts,
        prompt_length=np.mean([len(e.prompt_ids) for e in examples]),
        response_length=np.mean([len(e.response_ids) for e in examples]),
        new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        iterations=options.iterations,
        epochs=options.epochs,
        micro_batch_size=options.micro_batch_size,
        generation_batch_size=GENERATION_BATCH_SIZE,
        lora_rank=options.lora_rank,
        quantize=options.quantize,
        num_devices=options.shard or 1,
        num_streams=len(LOSSES[options.objective]().streams()),
    )
    print_estimate(estimate, options)
    print(
        "Checked: options, config, tokenizer, template, data, disk, and the "
        "weights' files in a local folder that has them. Not checked: the "
        "devices and the engine."
    )


def read_few_rows(options):
    """Some conversations, and how many there are at most."""
    few = max(NUM_CHECKED_ROWS, options.batch_size + options.micro_batch_size)
    few = min(few, options.max_prompts)
    if Path(options.data).suffix in (".jsonl", ".parquet"):
        conversations = keras_iris.data.read_conversations(options.data)
        num_rows = min(options.max_prompts, len(conversations))
        return conversations[:few], num_rows
    import datasets

    rows = datasets.load_dataset(
        options.data, split=options.split, streaming=True
    )
    conversations = keras_iris.data.read_conversations(
        itertools.islice(rows, few)
    )
    is_all = len(conversations) < few
    return conversations, len(conversations) if is_all else options.max_prompts


def print_estimate(estimate, options):
    """Prints memory, disk and time; stops where the disk is too small."""
    kind = "all weights" if options.lora_rank is None else "LoRA"
    print(
        f"\n{estimate.num_weights:,} weights, {estimate.num_trained:,} trained "
        f"({kind}). Estimates, not measured:"
    )
    memory = estimate.memory()
    print_table(f"memory a device, of {estimate.num_devices}", memory)
    disk = estimate.disk(needs_folder=options.engine != "keras")
    needed = sum(disk.values())
    folder = Path(options.run_dir).expanduser().absolute()
    free = shutil.disk_usage(
        next(p for p in [folder, *folder.parents] if p.exists())
    ).free
    print_table(
        f"disk of {folder}", disk | {"together": needed, "there is": free}
    )
    seconds = estimate.seconds(
        flops_per_second=options.flops_per_second,
        bytes_per_second=options.bytes_per_second,
    )
    print(
        f"time at {options.flops_per_second:.3g} operations and "
        f"{options.bytes_per_second:.3g} bytes a second and device"
    )
    for name, time in (seconds | {"together": sum(seconds.values())}).items():
        print(f"  {name:20} {time / 3600:10.2f} hours")
    if free < needed:
        raise SystemExit("The disk is too small. Pass another --run-dir.")


def print_table(title, sizes):
    """Prints bytes by name."""
    print(title)
    for name, size in sizes.items():
        print(f"  {name:20} {size / 2**30:10.2f} GiB")
