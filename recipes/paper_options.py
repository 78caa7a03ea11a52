"""Options of `zephyr_7b.py` and `qwen2_5_3b.py`, by default the paper's."""

import argparse
import shlex
import shutil
from pathlib import Path

import keras_iris

LOSSES = {
    "iris": keras_iris.losses.IRIS,
    "spin": keras_iris.losses.SPIN,
    "space": keras_iris.losses.SPACE,
    "spif": keras_iris.losses.SPIF,
    "sft": keras_iris.losses.SFT,
}
GENERATION_BATCH_SIZE = 32
HELD_OUT = 0.01  # of all conversations


def read_options(description, preset, arguments=None):
    """The options of a recipe."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--preset", default=preset, help="hf://org/name, or a folder")
    add(
        "--data",
        default="HuggingFaceH4/ultrachat_200k",
        help="a dataset's id, or a .jsonl or .parquet file",
    )
    add("--split", default="train_sft", help="of a dataset with an id")
    add("--max-prompts", type=positive(int), default=50_000)
    add("--run-dir", help="default: runs/ and the preset's name")
    add("--objective", choices=LOSSES, default="iris")
    add("--iterations", type=positive(int), default=5)
    add("--epochs", type=positive(int), default=2, help="of an iteration")
    add("--batch-size", type=positive(int), default=64, help="pairs")
    add(
        "--micro-batch-size",
        type=positive(int),
        default=8,
        help="pairs at a time",
    )
    add("--learning-rate", type=positive(float), default=5e-7)
    add(
        "--max-length",
        type=positive(int),
        default=2048,
        help="tokens of both together",
    )
    add("--max-new-tokens", type=positive(int), default=256)
    add("--lora-rank", type=positive(int), help="default: all weights")
    add("--quantize", choices=("int8", "int4"), help="the base of LoRA")
    add(
        "--shard",
        type=positive(int),
        metavar="N",
        help="cut all over N devices (JAX)",
    )
    add("--engine", choices=("keras", "server"), default="keras")
    add(
        "--server-command",
        type=shlex.split,
        help="of the server to start for each iteration, such as "
        "'vllm serve {folder} --port {port}'",
    )
    add(
        "--server-devices",
        metavar="IDS",
        help="the value of CUDA_VISIBLE_DEVICES for it; give the recipe "
        "itself other GPUs by that variable",
    )
    add("--server-url", help="of a server that runs, instead of a command")
    add(
        "--update-command",
        type=shlex.split,
        help="makes that server serve the folder that is appended to it, and "
        "returns when it does",
    )
    add(
        "--concurrency",
        type=positive(int),
        default=256,
        help="requests to the server at a time",
    )
    add("--dry-run", action="store_true", help="check and estimate, then stop")
    add(
        "--flops-per-second",
        type=positive(float),
        default=3e14,
        help="that a device does, for the estimate of the time",
    )
    add(
        "--bytes-per-second",
        type=positive(float),
        default=2e12,
        help="that a device reads from its memory, for the same",
    )
    options = parser.parse_args(arguments)
    if options.run_dir is None:
        options.run_dir = "runs/" + Path(options.preset).name
    check_options(parser, options)
    return options


def positive(kind):
    """Reads a number above 0."""

    def read(text):
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not number > 0:
            raise argparse.ArgumentTypeError(
                f"received {text!r}, expected {kind.__name__} above 0"
            )
        return number

    return read


def check_options(parser, options):
    """Refuses what doesn't go together."""
    if options.quantize and options.lora_rank is None:
        parser.error("--quantize needs --lora-rank")
    if options.quantize == "int8" and options.engine != "keras":
        parser.error(
            f"--quantize int8 doesn't go with --engine {options.engine}, which "
            "samples from an export: Keras' int8 rounds activations, and an "
            "export doesn't. Take --quantize int4 or --engine keras"
        )
    if options.engine == "server":
        command, url = options.server_command, options.server_url
        if bool(command) == bool(url):
            parser.error(
                "--engine server needs --server-command or --server-url"
            )
        if url and not options.update_command:
            parser.error("--server-url needs --update-command")
        if command and shutil.which(command[0]) is None:
            parser.error(f"--server-command: no program {command[0]!r}")
    if options.max_length <= options.max_new_tokens:
        parser.error("--max-length has to be above --max-new-tokens")
    sizes = {
        "--batch-size": options.batch_size,
        "--micro-batch-size": options.micro_batch_size,
        "the batch size of generation": GENERATION_BATCH_SIZE,
    }
    for name, size in sizes.items():
        if size % (options.shard or 1):
            parser.error(f"--shard {options.shard} has to divide {name}={size}")


def length_limits(options):
    """Half of the tokens are the prompt's, half the response's.

    Longer prompts are cut on the left, and conversations with a longer
    response left out.
    """
    half = options.max_length // 2
    return {"max_prompt_length": half, "max_response_length": half}


def split(examples, options):
    """Whole batches to train on, and the rest, held out."""
    least = max(options.micro_batch_size, int(HELD_OUT * len(examples)))
    num_batches = (len(examples) - least) // options.batch_size
    if num_batches < 1:
        raise SystemExit(
            f"{len(examples)} conversations are too few. Expected at least "
            f"{options.batch_size + least}: one batch and {least} held out. "
            "Pass more data or a smaller --batch-size."
        )
    num_train = num_batches * options.batch_size
    return examples[:num_train], examples[num_train:]
