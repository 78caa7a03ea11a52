"""Qwen2.5-3B's shape on one GPU: generation, training, and a restart.

    python benchmarks/qwen_3b.py

Random weights in bfloat16. Generation: prompts of log-normal lengths, at most
256 tokens, sampling at temperature 1, up to 256 new tokens. Random weights
never choose one end token of 151,936, so 1 of 256 ids ends an answer.
`KerasEngine` chooses its batch by the memory that is free;
`transformers.generate` gets the prompts sorted by length, in batches of 256.
Useful tokens are those of the answers. Training: LoRA of rank 16 for queries
and values, rematerialised, micro-batches of 8 pairs of 576 tokens, a third of
them prompts. A restart is the same process once more, which finds on the disk
what the first has compiled.
"""

import tempfile

import harness
import qwen_3b_contestants as contestants
import records

SETTINGS = {
    "device": "gpu",
    "sizes": contestants.QWEN_3B,
    "dtype": "bfloat16",
    "generation": {"prompts": 512, "mean_prompt_length": 128, "new": 256},
    "training": {"pairs": 16, "micro_batch_size": 8, "length": 576},
}
QUICK = SETTINGS | {
    "device": "cpu",
    "sizes": contestants.models.TINY,
    "dtype": "float32",
    "generation": {"prompts": 32, "mean_prompt_length": 12, "new": 8},
    "training": {"pairs": 4, "micro_batch_size": 2, "length": 24},
}
# Goals of the design, for an H100 or H200.
LEAST_TOKENS, MOST_SECONDS = 15_000, 30


def main():
    """Measures one after another; each has the GPU to itself."""
    arguments = records.parse_arguments(__doc__)
    settings = QUICK if arguments.quick else SETTINGS
    records.check_device(settings["device"])

    def measure(name, contestant, part, backend="jax"):
        with harness.Worker(
            contestants.__file__,
            contestant,
            backend=backend,
            device=settings["device"],
            sizes=settings["sizes"],
            dtype=settings["dtype"],
            work=settings[part],
            cache=cache,
        ) as worker:
            row = {"contestant": name, **worker.call("run")}
        print(row, flush=True)  # this takes minutes
        return row

    with tempfile.TemporaryDirectory() as cache:
        ours = measure("KerasEngine, jax", "Engine", "generation")
        first, restart = (
            measure(name, "Training", "training")
            for name in ("LoRA, jax", "LoRA, jax, restarted")
        )
        peer = measure(
            "transformers.generate", "Transformers", "generation", "torch"
        )
    records.finish(
        __file__,
        arguments,
        settings=settings,
        rows=[first, restart, ours, peer],
        bars=[
            records.bar(
                "useful tokens/s of KerasEngine",
                ours["tokens/s"],
                at_least=LEAST_TOKENS,
            ),
            records.bar(
                "seconds of a restart to the end of the first step",
                restart["s to first"],
                at_most=MOST_SECONDS,
            ),
        ],
    )


if __name__ == "__main__":
    main()
