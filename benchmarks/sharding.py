"""What the devices of a sharded training step send each other.

    python benchmarks/sharding.py

A step of keras_iris (IRIS, AdamW, float32, layers computed again) on virtual
devices of the CPU, compiled, not run: bytes of each kind of collective that a
device takes part in, counted in XLA's program, and temporary memory of a
device. Beside them stands the least that FSDP has to move: every device gathers
the weights that it lacks in the forward pass and again in the backward pass,
and the gradients are added up, which moves as much once more. XLA on CPUs adds
up with all-reduce, not reduce-scatter, which moves twice that; so the ratio is
with each all-reduce of a gradient counted once, as it would be elsewhere.

For weak scaling the batch grows with the devices: what a device sends and holds
should stay the same.
"""

import math
import os
import re
import sys

MODEL = {
    "vocabulary": 8_192,
    "layers": 8,
    "width": 256,
    "heads": 8,
    "key_value_heads": 8,
    "inner_width": 768,
}
QUICK_MODEL = {
    "vocabulary": 512,
    "layers": 2,
    "width": 64,
    "heads": 8,
    "key_value_heads": 8,
    "inner_width": 128,
}
PAIRS_PER_DEVICE, LENGTH = 2, 128
LAYOUTS = {
    "1": None,
    "2x1 fsdp": ({"data": 2}, "fsdp"),
    "4x1 fsdp": ({"data": 4}, "fsdp"),
    "8x1 fsdp": ({"data": 8}, "fsdp"),
    "2x4 2d": ({"data": 2, "model": 4}, "2d"),
    "8x1 data": ({"data": 8}, "data"),
}
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1}
# `%name = f32[8,16]{1,0} all-gather(`, or a tuple of such shapes.
_COLLECTIVE = re.compile(
    rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def compiled_step(layout, sizes, num_pairs, length):
    """A training step, compiled, and the bytes of its trained weights."""
    import jax
    import keras
    import models
    import numpy as np

    import keras_iris
    from keras_iris.models import log_probs
    from keras_iris.models.remat import remat_layers

    # One tile, so that no collective is in a loop and counted once for many.
    log_probs._CPU_TILE = (2 * num_pairs * length, 8192)
    keras.backend.clear_session()
    distribution = None
    if layout is not None:
        distribution = keras_iris.distribution.make_distribution(*layout)
    keras.distribution.set_distribution(distribution)
    causal_lm = models.keras_model(sizes)
    remat_layers(causal_lm.backbone)
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.AdamW(1e-5), loss=keras_iris.losses.IRIS()
    )
    model.optimizer.build(model.trainable_variables)
    model._symbolic_build()
    mask = np.ones((num_pairs, 2, length), bool)
    batch = (
        {
            "token_ids": np.ones(mask.shape, "int32"),
            "padding_mask": mask,
            "response_mask": mask,
        },
        np.zeros((num_pairs, 2), "float32"),
        np.ones(num_pairs, "float32"),
    )
    batch = keras.tree.map_structure(keras_iris.backend.cut, batch)
    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    shardings = tuple([v.value.sharding for v in group] for group in groups)
    step = jax.jit(
        model.train_step,
        donate_argnums=0,
        out_shardings=None if layout is None else (None, shardings),
    )
    num_bytes = sum(v.value.nbytes for v in model.trainable_variables)
    return step.lower(state, batch).compile(), num_bytes


def collective_bytes(text):
    """Bytes that a device receives, by kind of collective.

    Args:
        text: XLA's program for one device. Every collective in it runs once.
    """
    found = dict.fromkeys(KINDS, 0)
    for shapes, kind in _COLLECTIVE.findall(text):
        for dtype, dimensions in _SHAPE.findall(shapes):
            size = math.prod(int(d) for d in dimensions.split(",") if d)
            found[kind] += size * _BYTES.get(dtype, 4)
    return found


def measure(name, sizes, pairs_per_device, length):
    """The figures of a layout."""
    layout = LAYOUTS[name]
    count = 1 if layout is None else math.prod(layout[0].values())
    program, num_bytes = compiled_step(
        layout, sizes, pairs_per_device * count, length
    )
    moved = collective_bytes(program.as_text())
    return {
        "layout": name,
        "devices": count,
        "all-gather MB": moved["all-gather"] / 1e6,
        "all-reduce MB": moved["all-reduce"] / 1e6,
        "other MB": sum(moved[kind] for kind in KINDS[2:]) / 1e6,
        "x least of FSDP": sum(moved.values()) / (3 * num_bytes),
        "weights MB": num_bytes / 1e6,
        "temporary MB": program.memory_analysis().temp_size_in_bytes / 1e6,
    }


def main():
    """Compiles the step for each layout."""
    flags = "--xla_force_host_platform_device_count=8"
    os.environ.update(KERAS_BACKEND="jax", XLA_FLAGS=flags)
    import records

    arguments = records.parse_arguments(__doc__)
    sizes = QUICK_MODEL if arguments.quick else MODEL
    length = 16 if arguments.quick else LENGTH
    rows = [measure(name, sizes, PAIRS_PER_DEVICE, length) for name in LAYOUTS]
    one = next(row for row in rows if row["layout"] == "1")
    for row in rows:
        row["x memory of one"] = row["temporary MB"] / one["temporary MB"]
    fsdp = next(row for row in rows if row["layout"] == "8x1 fsdp")
    records.finish(
        __file__,
        arguments,
        settings={
            "model": sizes,
            "pairs per device": PAIRS_PER_DEVICE,
            "length": length,
            "micro_batch_size": None,
        },
        rows=rows,
        bars=[
            records.bar(
                "8x1: bytes over the least of FSDP",
                fsdp["x least of FSDP"],
                at_most=1.3,
            ),
            records.bar(
                "8x1: a device's temporary memory over one's at an eighth of "
                "the batch",
                fsdp["x memory of one"],
                at_most=1.15,
            ),
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
