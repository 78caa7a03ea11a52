"""A tiny run of self-play, on one device or several: `python THIS JSON`.

The options: `run_dir`, `mesh` and `strategy` of `make_distribution` (JAX),
`mirrored` devices (TensorFlow), `lora_rank`, `quantize`, `iterations`, `kill`:
at which of "step", "generation" and "save" this process is to be killed,
`outside`: whether an engine of another process answers, which one process has,
`experts`: whether the model has some, with routers.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from safetensors.numpy import load_file
from tiny_models import make_causal_lm

import keras_iris
from keras_iris import backend
from keras_iris.callbacks import AlphaScheduler, SelfPlayCallback
from keras_iris.data import Example, PairDataset
from keras_iris.evaluation import HeldOut
from keras_iris.generation import Completion, Engine
from keras_iris.hub.load import quantize_matrices
from keras_iris.models.lora import Lora, add_lora

END, VOCABULARY_SIZE, NUM_EXAMPLES = 1, 64, 24


def make_examples(number=NUM_EXAMPLES, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        size = rng.integers(low, high)
        return rng.integers(2, VOCABULARY_SIZE, size).astype("int32")

    return [
        Example(ids(3, 6), np.append(ids(3, 6), np.int32(END)))
        for _ in range(number)
    ]


class Killer(SelfPlayCallback):
    """Kills this process in the middle of something."""

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def on_train_batch_end(self, batch, logs=None):
        if self.moment == "step" and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_generate_end(self, iteration, responses, logs=None):
        if self.moment == "generation" and iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL)


class Outside(Engine):
    """Answers in another process, as it were, and notes what it is asked."""

    reads = "export"

    def __init__(self, folder):
        self._notes = Path(folder) / "asked.jsonl"

    def _note(self, *what):
        with self._notes.open("a") as file:
            file.write(json.dumps([backend.process_index(), *what]) + "\n")

    def update(self, folder):
        weights = load_file(folder / "model.safetensors")
        total = sum(
            np.abs(array).sum(dtype=float) for array in weights.values()
        )
        self._note(len(weights), round(total, 2))

    def generate(self, prompts, *, seed):
        self._note(len(prompts))
        rng = np.random.default_rng(seed)
        ids = rng.integers(2, VOCABULARY_SIZE, (len(prompts), 3)).tolist()
        return [Completion((*row, END), "stop") for row in ids]

    def get_config(self):
        return {}


def kill_in_save(model):
    """Kills this process while the others write a checkpoint."""
    from keras_iris.backend.jax_checkpoint import ShardedCheckpoints

    save = ShardedCheckpoints.save

    def save_and_die(self, folder, variables, metadata):
        if "checkpoint-002" in folder.name:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, folder, variables, metadata)

    ShardedCheckpoints.save = save_and_die


def main(options):
    keras_iris.distribution.initialize()
    keras.utils.set_random_seed(0)
    scope = contextlib.nullcontext()
    if options.get("mesh"):
        keras.distribution.set_distribution(
            keras_iris.distribution.make_distribution(
                options["mesh"], options["strategy"]
            )
        )
    if number := options.get("mirrored"):
        import tensorflow as tf

        [cpu] = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * number
        )
        names = [f"CPU:{i}" for i in range(number)]
        scope = tf.distribute.MirroredStrategy(names).scope()
    with scope:
        model = make_model(options)
    run(model, options)


def make_model(options):
    sizes = {"vocabulary_size": VOCABULARY_SIZE, "num_layers": 1}
    if options.get("experts"):
        sizes |= {
            "architecture": "qwen_moe",
            "router_aux_loss_coefficient": 3.0,
        }
    causal_lm = make_causal_lm(**sizes)
    if mode := options.get("quantize"):
        quantize_matrices(causal_lm, mode)
    if rank := options.get("lora_rank"):
        add_lora(causal_lm.backbone, Lora(rank, targets="all"))
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.Adam(0.01, clipnorm=1.0),
        loss=keras_iris.losses.IRIS(),
        micro_batch_size=options.get("micro_batch_size", 8),
    )
    return model


def run(model, options):
    kill = options.get("kill")
    if kill == "save":
        kill_in_save(model)
    examples = make_examples(seed=options.get("seed", 0))
    outside = options.get("outside")
    self_play = keras_iris.SelfPlay(
        model,
        examples,
        options["run_dir"],
        iterations=options.get("iterations", 2),
        epochs=2,
        batch_size=16,
        max_response_length=5,
        shard_size=8,
        engine=Outside(options["run_dir"]) if outside else None,
        checkpoint_every_steps=1,
        callbacks=[AlphaScheduler(), Killer(kill)],
        evaluate=HeldOut(make_examples(10, seed=1), batch_size=8, samples=0),
        keep_best="nll_per_token",
    )
    self_play.run()
    weights = [backend.read(v) for v in model.causal_lm.backbone.variables]
    if not options.get("lora_rank"):
        folder = Path(options["run_dir"]) / "model"
        keras_iris.export(model.causal_lm, folder, dtype="float32")
    seen = {"process": backend.process_index()}
    if backend.is_cut():
        report = keras_iris.distribution.sharding_report(model)
        seen["largest_share"] = (
            report.bytes_per_device * report.num_devices / report.num_bytes
        )
    # What Keras logs of it, in whole batches.
    responses = [example.response_ids for example in examples]
    pairs = PairDataset(
        examples, responses[::-1], np.full((24, 2), -9.0), batch_size=24
    )
    model.compile("sgd", loss=keras_iris.losses.IRIS())
    seen["losses"] = [
        float(model.evaluate(pairs, verbose=0)),
        float(model.fit(pairs, verbose=0).history["loss"][0]),
    ]
    if backend.process_index() == 0:
        folder = Path(options["run_dir"])
        np.savez(folder / "weights.npz", *weights)
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
