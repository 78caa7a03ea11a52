"""IRIS on Zephyr-7B (Mistral), from its SFT checkpoint.

    export KERAS_BACKEND=jax
    python recipes/zephyr_7b.py --dry-run             # checks and estimates
    python recipes/zephyr_7b.py --lora-rank 16        # one 80 GB GPU
    python recipes/zephyr_7b.py --lora-rank 16 --quantize int8
    python recipes/zephyr_7b.py --shard 8             # all weights, 8 GPUs

The setting is the paper's, in `paper_setting.py`; `--help` lists what can be
changed, `--preset FOLDER --data FILE.jsonl` takes your own. 5e-7 is the rate
for all weights: adapters may want a higher --learning-rate. With
`--engine server`, the server needs a GPU of its own, such as with
CUDA_VISIBLE_DEVICES=0 and `--server-devices 1`.

Hardware: GPUs with bfloat16; --shard needs JAX and one machine.
Memory of a device, estimated by the dry run, which lists the parts and gives
disk and time too:

    LoRA of rank 16               43 GiB
    LoRA, int8 base               37 GiB
    all weights, on 8 devices     19 GiB

Training all weights writes checkpoints of 54 GiB; the disk has to
hold four.

Not measured: anything with the real weights, be it memory, time or scores.
Tested on a CPU: the recipe from end to end on a tiny random checkpoint of
this architecture and type of tokenizer (`tests/test_recipes.py`), and that
shards on 4 virtual devices give one device's numbers
(`tests/test_distribution.py`).
"""

import paper_setting


def main(arguments=None):
    """Runs the recipe."""
    paper_setting.main(
        __doc__,
        preset="hf://alignment-handbook/zephyr-7b-sft-full",
        template_name="zephyr",
        arguments=arguments,
    )


if __name__ == "__main__":
    main()
