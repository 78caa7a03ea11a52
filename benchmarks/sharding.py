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
should stay the same. The last two rows are of local processes with four devices
each, one and two of them, which see the others' devices through JAX.
"""

import contextlib
import math
import os
import re
import socket
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
DEVICES_OF_PROCESS = 4
_DEVICES = "--xla_force_host_platform_device_count="
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


class Process:
    """One of several processes: `harness.Worker` starts them side by side.

    Args:
        **settings: Arguments of `measure`.
    """

    def __init__(self, **settings):
        import keras_iris

        keras_iris.distribution.initialize()
        self.figures = measure(**settings)

    def read(self):
        """The figures."""
        return self.figures


def measure_processes(number, **settings):
    """The figures of FSDP over processes, of which each has some devices."""
    import harness

    count = number * DEVICES_OF_PROCESS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                harness.Worker(
                    __file__,
                    "Process",
                    backend="jax",
                    environment={
                        "XLA_FLAGS": f"{_DEVICES}{DEVICES_OF_PROCESS}",
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                        "WORLD_SIZE": str(number),
                        "RANK": str(rank),
                    },
                    name=f"{count}x1 fsdp",
                    **settings,
                )
            )
            for rank in range(number)
        ]
        figures = [worker.call("read") for worker in workers]
        for worker in workers:  # each waits for the others before it ends
            worker.close()
    if any(found != figures[0] for found in figures):
        raise RuntimeError(f"The processes have different programs: {figures}")
    layout = f"{figures[0]['layout']}, processes: {number}"
    return figures[0] | {"layout": layout}


def main():
    """Compiles the step for each layout."""
    os.environ.update(KERAS_BACKEND="jax", XLA_FLAGS=f"{_DEVICES}8")
    import records

    arguments = records.parse_arguments(__doc__)
    sizes = QUICK_MODEL if arguments.quick else MODEL
    length = 16 if arguments.quick else LENGTH
    settings = {
        "sizes": sizes,
        "pairs_per_device": PAIRS_PER_DEVICE,
        "length": length,
    }
    rows = [measure(name, **settings) for name in LAYOUTS]
    rows += [measure_processes(number, **settings) for number in (1, 2)]
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
