"""How long the paper's two runs would take here, on several machines.

    python benchmarks/plan.py

Nothing is run: times follow from sizes, from two rates that were measured once
(Qwen2.5-3B's shape with LoRA on one H200: 29,000 tokens a second in training,
81,700 tokens generated in 28.7 s with compilation) and from the makers' figures
for other chips. Each column says which it is. What was measured on one H200 is
taken for an H100, too, whose matrix products are as fast. For a v5e the rate of
products is the same share of its peak, and that of reading the same share of
its memory's. Sending is counted as what FSDP has to move in a step, at half of
the links' peak, as if nothing went on beside it.
"""

import dataclasses
import sys

GIB = 2**30
PROMPTS, ITERATIONS, EPOCHS, BATCH = 50_000, 5, 2, 64
PROMPT, ANSWER, NEW = 180, 260, 256  # tokens, assumed
MODELS = {
    "Zephyr-7B": {
        "model_type": "mistral",
        "vocab_size": 32_000,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen2.5-3B": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 2_048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
PAPER_HOURS = {"Zephyr-7B": 20.2, "Qwen2.5-3B": 8.7}  # on 8 H100


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device.

    Attributes:
        peak: Products in bfloat16, operations a second (its maker's).
        memory: Bytes a second of its memory (its maker's).
        links: Bytes a second to other chips (its maker's).
        size: Bytes of its memory.
    """

    peak: float
    memory: float
    links: float
    size: float


H100 = Chip(9.89e14, 3.35e12, 9e11, 80 * GIB)
H200 = Chip(9.89e14, 4.8e12, 9e11, 141 * GIB)
V5E = Chip(1.97e14, 8.19e11, 2e11, 16 * GIB)
# On the H200, by benchmarks and the run above: the rest follows.
FLOPS, READING = 5e14, 5.5e11
MACHINES = {
    "1 H100": (H100, 1),
    "8 H100": (H100, 8),
    "v5e-16": (V5E, 16),
    "v5e-256": (V5E, 256),
}


def plan(name, machine, lora_rank):
    """The row of a model on a machine."""
    from keras_iris.hub.decoder_config import DecoderConfig
    from keras_iris.run_estimate import RunEstimate

    chip, count = MACHINES[machine]
    micro = max(1, 8 // max(1, count // 8)) * count
    run = RunEstimate(
        config=DecoderConfig.from_json(MODELS[name]),
        num_prompts=PROMPTS,
        prompt_length=PROMPT,
        response_length=ANSWER,
        new_tokens=NEW,
        max_length=2_048,
        iterations=ITERATIONS,
        epochs=EPOCHS,
        micro_batch_size=min(BATCH, micro),
        generation_batch_size=32 * count,
        lora_rank=lora_rank,
        dtype="bfloat16" if lora_rank else "mixed_bfloat16",
        mesh={"data": count},
        flops_per_second=FLOPS * chip.peak / H200.peak,
        bytes_per_second=READING * chip.memory / H200.memory,
    )
    hours = {part: value / 3600 for part, value in run.seconds().items()}
    steps = ITERATIONS * EPOCHS * PROMPTS / min(BATCH, micro)
    moved = 3 * 2 * run.num_weights if count > 1 else 0
    hours["sending"] = steps * moved / (chip.links / 2) / 3600
    memory = run.memory()
    # For answers `KerasEngine` takes what is free, be it much or little.
    least = max(memory["training"], memory["generation"] - memory["answers"])
    fits = least < 0.9 * chip.size
    return {
        "model": name,
        "machine": machine,
        "trains": "all weights" if lora_rank is None else f"LoRA {lora_rank}",
        "GiB a device (computed)": least / GIB,
        "fits (computed)": "yes" if fits else "no",
        "generation h (computed from a measured rate)": hours["generation"],
        "training h (computed from a measured rate)": hours["training"]
        + hours["scoring"],
        "sending h (computed)": hours["sending"],
        "paper, 8 H100 (theirs), h": PAPER_HOURS[name]
        if (machine, lora_rank) == ("8 H100", None)
        else "",
    }


def main():
    """Writes the table."""
    import records

    arguments = records.parse_arguments(__doc__)
    rows = [
        plan(name, machine, lora_rank)
        for name in MODELS
        for machine in MACHINES
        for lora_rank in (None, 16)
    ]
    records.finish(
        __file__,
        arguments,
        settings={
            "prompts": PROMPTS,
            "tokens of a prompt, an annotated and a synthetic response": [
                PROMPT,
                ANSWER,
                NEW,
            ],
        },
        rows=rows,
        bars=[],
    )


if __name__ == "__main__":
    sys.exit(main())
