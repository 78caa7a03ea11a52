"""Sharded runs give one device's numbers."""

import json
import re
import signal
import subprocess
import sys
import time

import distributed_run
import keras
import numpy as np
import pytest
from programs import TESTS, environment, environments
from safetensors.numpy import load_file

import keras_iris
from keras_iris.distribution.launch import Launch, read_environment

# What runs of tests/distributed_run.py warn of.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOLERANCE = 1e-5  # float32, relative: sums in another order
LARGEST_SHARE = 1.15  # of an equal one; norms and biases are whole

PROGRAM = """
import json, sys
import keras, numpy as np
import keras_iris
from keras_iris.distribution import make_distribution
from keras_iris.lm_eval.continuations import ContinuationScorer
from tiny_models import make_pairs

def run(folder, options):
    causal_lm = keras_iris.load(folder, remat=True, **options)
    for variable in causal_lm.trainable_variables:
        if "lora" in variable.path:
            shape = tuple(variable.shape)
            variable.assign(np.random.default_rng(0).normal(0, 0.1, shape))
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.RMSprop(1e-3),
        loss=keras_iris.losses.IRIS(alpha=1.5),
        micro_batch_size=4,
    )
    pairs = make_pairs(batch_size=8)
    opponent = model.predict(pairs, verbose=0)
    losses = [float(model.train_on_batch(pairs, opponent)) for _ in range(3)]
    engine = keras_iris.generation.KerasEngine(
        causal_lm, end_token_ids=(2,), max_new_tokens=5, batch_size=8
    )
    completions = engine.generate([[5, 6, 7]] * 8, seed=0)
    requests = [([5, 6, 7, 8], [i, 9]) for i in range(6)] + [([3], [4])]
    scorer = ContinuationScorer(causal_lm, batch_size=6, max_length=16)
    scores = {}
    for found in scorer(requests):
        scores |= found
    log_probs = [scores[i][0] for i in range(len(requests))]
    variables = causal_lm.variables + model.optimizer.variables
    sizes = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            device = shard.device.id
            sizes[device] = sizes.get(device, 0) + shard.data.nbytes
    total = sum(variable.value.nbytes for variable in variables)
    share = max(sizes.values()) * len(sizes) / total
    tokens = [c.token_ids for c in completions]
    return opponent.tolist(), losses, log_probs, tokens, share

folder, target, options = sys.argv[1:]
one = run(folder, json.loads(options))
keras.distribution.set_distribution(make_distribution())
four = run(folder, json.loads(options))
with open(target, "w") as file:
    json.dump([one, four], file)
"""


def run_on_devices(number, program, *arguments):
    subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment(number),
        check=True,
        cwd=TESTS.parent,
        stdout=subprocess.DEVNULL,
    )


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mistral", {}),
        pytest.param("qwen2", {"lora_rank": 2}, marks=pytest.mark.slow),
    ],
)
def test_sharded(architecture, options, checkpoint, tmp_path):
    target = tmp_path / "results.json"
    options = json.dumps(options)
    run_on_devices(4, PROGRAM, checkpoint(architecture), target, options)
    one, four = json.loads(target.read_text())
    for expected, actual in zip(one[:3], four[:3], strict=True):
        np.testing.assert_allclose(
            actual, expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    assert four[3] == one[3]  # generated tokens
    assert one[4] == 1
    assert four[4] < LARGEST_SHARE


QUEUES = """
import json, sys
import jax, keras, numpy as np
import keras_iris
from keras_iris.distribution import make_distribution
from keras_iris.generation import KerasEngine
from tiny_models import make_causal_lm

NEW, PROMPTS = 200, [[5 + i % 20] * (3 + i % 5) for i in range(60)]
steps = 0

def run(batch_size):
    global steps
    steps = 0
    causal_lm = make_causal_lm(num_layers=1)
    engine = KerasEngine(
        causal_lm,
        end_token_ids=range(2, 5),
        max_new_tokens=NEW,
        batch_size=batch_size,
        bucket_lengths=(8,),
    )
    decoder = engine._decoder
    size = batch_size * decoder.waves
    inputs = {
        "prompts": np.ones((size, 8), "int32"),
        "lengths": np.full(size, 8, "int32"),
        "is_active": np.ones(size, bool),
        "noise": np.zeros((size, 2 * NEW), "float32"),
    }
    variables = causal_lm.variables

    def answer(inputs, values):
        mapping = zip(variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            return decoder.generate_step(inputs, (2,))

    cut = {name: keras_iris.backend.cut(a) for name, a in inputs.items()}
    program = jax.jit(answer).lower(cut, [v.value for v in variables])
    program = program.compile()
    memory = program.memory_analysis().temp_size_in_bytes
    step = decoder.forward.step

    def count():
        global steps
        steps += 1

    def counted(*arguments):
        jax.debug.callback(count)
        return step(*arguments)

    decoder.forward.step = counted
    answers = engine.generate(PROMPTS, seed=0)
    jax.effects_barrier()
    tokens = [c.token_ids for c in answers]
    return memory, steps, program.as_text(), tokens

one = run(4)
keras.distribution.set_distribution(make_distribution())
with open(sys.argv[1], "w") as file:
    json.dump([one, run(16)], file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_every_device_has_a_queue_of_prompts(tmp_path):
    """Its answers that are over make room, and it computes no others."""
    target = tmp_path / "results.json"
    run_on_devices(4, QUEUES, target)
    one, (on_four, steps, text, answers) = json.loads(target.read_text())
    assert answers == one[-1]
    lengths = [len(answer) for answer in answers]
    # Batches of 16 that end with their longest answers.
    waiting = sum(max(lengths[i : i + 16]) for i in range(0, 60, 16))
    assert steps < 0.7 * waiting
    assert on_four < 1.15 * one[0]
    # Sums of floats over devices: each would have a part of every row.
    assert re.search(r"all-reduce\(", text)
    assert not re.search(r"= \(?f32.* all-reduce\(", text)


DATA_PARALLEL = """
import json, sys
import jax, keras, numpy as np
from keras_iris.models import log_probs

# One tile, as XLA counts the body of a loop once.
log_probs._CPU_TILE = (4096, 4096)
rng = np.random.default_rng(0)
hidden = rng.standard_normal((8, 33, 16), "float32")
ids = rng.integers(0, 128, (8, 33))
mask = rng.random((8, 33)) < 0.7

def run():
    keras.utils.set_random_seed(0)
    head = keras.layers.ReversibleEmbedding(128, 16)
    head.build()
    table = head.embeddings

    def loss(value, hidden, ids, mask):
        with keras.StatelessScope(state_mapping=[(table, value)]):
            found = log_probs.sequence_log_probs(hidden, ids, mask, head=head)
        return found.sum()

    batch = (hidden, ids, mask)
    distribution = keras.distribution.distribution()
    if distribution is not None:
        layouts = [distribution.get_data_layout(a.shape) for a in batch]
        batch = [
            jax.device_put(array, layout.backend_layout)
            for array, layout in zip(batch, layouts)
        ]
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    compiled = step.lower(table.value, *batch).compile()
    value, (by_table, by_hidden) = compiled(table.value, *batch)
    numbers = np.concatenate([np.ravel(by_table), np.ravel(by_hidden)])
    return [float(value), *numbers.tolist()], compiled.cost_analysis()["flops"]

one = run()
keras.distribution.set_distribution(keras.distribution.DataParallel())
with open(sys.argv[1], "w") as file:
    json.dump([one, run()], file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_data_parallel_cuts_the_head_along_the_batch(tmp_path):
    target = tmp_path / "results.json"
    run_on_devices(4, DATA_PARALLEL, target)
    (expected, flops), (actual, flops_of_a_device) = json.loads(
        target.read_text()
    )
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert flops_of_a_device < 0.3 * flops


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"data": 1000},), "in all at most"),
        (({"model": 1},), "devices of data"),
        (("auto", "3d"), "'fsdp', '2d' or 'data'"),
    ],
)
def test_sharding_that_cannot_be(arguments, message):
    is_jax = keras.backend.backend() == "jax"
    with pytest.raises(ValueError, match=message if is_jax else "torchrun"):
        keras_iris.distribution.make_distribution(*arguments)


TORCHRUN = {
    "MASTER_ADDR": "host",
    "MASTER_PORT": "12",
    "WORLD_SIZE": "4",
    "RANK": "3",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_ID": "70003",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_PROCID": "1",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launch("host:12", 4, 3)),
        (SLURM, Launch("n1:12003", 2, 1)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch(None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        (
            {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:1,b:1",
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": "0",
            },
            Launch("a:1", 2, 0),
        ),
    ],
)
def test_launch(variables, expected):
    assert read_environment(variables) == expected


def test_launch_that_cannot_be():
    with pytest.raises(ValueError, match="RANK has to be a number"):
        read_environment(TORCHRUN | {"RANK": "one"})
    with pytest.raises(ValueError, match="an address, their number"):
        keras_iris.distribution.initialize("host:1", 2)
    assert keras_iris.distribution.initialize() == 1


LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


def start_run(variables, **options):
    """A process of tests/distributed_run.py."""
    return subprocess.Popen(
        [
            sys.executable,
            str(TESTS / "distributed_run.py"),
            json.dumps(options, default=str),
        ],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes, seconds=600):
    """Their exit statuses and what they printed."""
    outputs = [p.communicate(timeout=seconds)[0] for p in processes]
    return [p.returncode for p in processes], outputs


def run_two(num_devices, *, others=None, **options):
    """Runs two processes; `others` are options of the second."""
    both = zip(environments(2, num_devices), [{}, others or {}], strict=True)
    return finish(
        *(start_run(variables, **options | more) for variables, more in both)
    )


def run_one(num_devices=1, **options):
    if num_devices == 1 and not options.get("mirrored"):
        distributed_run.main(options)  # here, as nothing has to be set before
        return
    status, outputs = finish(start_run(environment(num_devices), **options))
    assert status == [0], outputs[0][-3000:]


def read_losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if line["kind"] == "step"]
    return np.array([step["loss"] for step in steps])


def assert_same(folder, expected):
    np.testing.assert_allclose(
        read_losses(folder), read_losses(expected), atol=LOSS_TOLERANCE
    )
    for file in expected.glob("model/*.safetensors"):
        exported = load_file(folder / "model" / file.name)
        for name, array in load_file(file).items():
            np.testing.assert_allclose(
                exported[name], array, atol=WEIGHT_TOLERANCE
            )
    np.testing.assert_allclose(
        *(
            json.loads((f / "seen.json").read_text())["losses"]
            for f in (folder, expected)
        ),
        atol=LOSS_TOLERANCE,
        rtol=1e-4,
    )
    weights, there = (np.load(f / "weights.npz") for f in (folder, expected))
    for name in there.files:
        np.testing.assert_allclose(
            weights[name], there[name], atol=WEIGHT_TOLERANCE
        )


FSDP = {"mesh": {"data": 8}, "strategy": "fsdp"}
TWO_D = {"mesh": {"data": 2, "model": 4}, "strategy": "2d"}


@pytest.mark.multi_device
def test_several_devices_train_as_one(tmp_path):
    """A run ends in one device's weights, and goes on on other devices."""
    name = keras.backend.backend()
    one, many = tmp_path / "one", tmp_path / "many"
    run_one(run_dir=one)
    if name == "tensorflow":
        run_one(run_dir=many, mirrored=2)
    elif name == "torch":
        status, outputs = run_two(1, run_dir=many)
        assert status == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    else:
        status, outputs = run_two(4, run_dir=many, iterations=1, **FSDP)
        assert status == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
        run_one(8, run_dir=many, **TWO_D)
    assert_same(many, one)


@pytest.mark.multi_device
def test_routers_of_experts(tmp_path):
    """Their loss is that of the tokens of all devices.

    And where these are of two processes, an engine outside answers one.
    """
    name = keras.backend.backend()
    one, two = tmp_path / "one", tmp_path / "two"
    # Micro-batches are one pass less where one device has whole batches.
    options = {"experts": True, "outside": True, "iterations": 1}
    run_one(run_dir=one, **options, micro_batch_size=None)
    options["run_dir"] = two
    if name == "torch":
        status, outputs = run_two(1, **options)
        assert status == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    elif name == "tensorflow":
        run_one(mirrored=2, **options)
    else:
        run_one(2, mesh={"data": 2}, strategy="fsdp", **options)
    assert_same(two, one)
    assert_process_0_asks(two, one)


def assert_process_0_asks(folder, expected):
    """An engine outside got all weights, and answered 24 prompts once."""
    asked = (folder / "asked.jsonl").read_text()
    assert asked == (expected / "asked.jsonl").read_text()
    answered = [json.loads(line) for line in asked.splitlines()][1:]
    assert answered == [[0, 8]] * 3


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_adapters_of_quantized_weights(tmp_path):
    """Two processes train them, with a device each, and an engine gets them."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"outside": True, "iterations": 1}
    options |= {"lora_rank": 2, "quantize": "int4"}
    run_one(run_dir=one, **options)
    cut = {"mesh": {"data": 2}, "strategy": "fsdp"}
    status, outputs = run_two(1, run_dir=two, **options, **cut)
    assert status == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert_same(two, one)
    assert_process_0_asks(two, one)


CHECKPOINTS = """
import json, sys, shutil, warnings
from pathlib import Path
import keras, numpy as np
import keras_iris
from keras_iris.self_play.checkpoints import Checkpoints

def position(iteration, epoch=0, batch=0):
    return {"iteration": iteration, "epoch": epoch, "batch": batch}

folder = Path(sys.argv[1])
make_distribution = keras_iris.distribution.make_distribution
keras.distribution.set_distribution(make_distribution())
value = np.arange(64 * 32, dtype="float32").reshape(64, 32)
variable = keras.Variable(value, name="kernel")
assert not variable.value.is_fully_replicated
checkpoints, found = Checkpoints(folder), []

def load(**options):
    found.append(checkpoints.load([variable], **options))
    found.append(float(np.asarray(variable.value)[0, 0]))

for number, place in enumerate(
    [position(1), position(1, 0, 3), position(1, 1, 0), position(2),
     position(2, 0, 1)]
):
    variable.assign(value + number)
    checkpoints.save([variable], place)
checkpoints.wait()
found.append(sorted(f.name for f in folder.iterdir()))
load()
load(is_back=True)
variable.assign(value + 7)
checkpoints.save([variable], position(2))  # again
load()
shutil.rmtree(folder / "starts" / "iteration_002" / "arrays")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    load()
found.append([str(w.message) for w in caught])
keras.distribution.set_distribution(None)
variable = keras.Variable(value * 0)
checkpoints = Checkpoints(folder)
load(is_back=True)
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_checkpoints_over_devices(tmp_path):
    folder, target = tmp_path / "run", tmp_path / "found.json"
    folder.mkdir()
    run_on_devices(4, CHECKPOINTS, folder, target)
    found = json.loads(target.read_text())
    assert found[0] == ["checkpoint-002-0-00001", "starts"]
    first = {"iteration": 1, "epoch": 0, "batch": 0}
    second = first | {"iteration": 2}
    assert found[1:3] == [second | {"batch": 1}, 4.0]
    assert found[3:5] == [second, 3.0]
    assert found[5:7] == [second, 7.0]
    assert found[7:9] == [first, 0.0]  # the second start is damaged
    assert len(found[9]) == 1 and "iteration_002" in found[9][0]
    assert found[10:] == [first, 0.0]  # without a distribution


REPORT = """
import json, sys, warnings
import keras
import keras_iris
from tiny_models import make_causal_lm

found = []
for vocabulary_size in (256, 255):
    keras.distribution.set_distribution(
        keras_iris.distribution.make_distribution()
    )
    causal_lm = make_causal_lm(
        vocabulary_size=vocabulary_size, hidden_dim=128, intermediate_dim=256
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = keras_iris.distribution.sharding_report(causal_lm)
    found.append(
        [len(caught), report.whole_share, list(report.whole)[0], str(report)]
    )
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_a_report_tells_what_is_on_every_device(tmp_path):
    target = tmp_path / "found.json"
    run_on_devices(4, REPORT, target)
    even, odd = json.loads(target.read_text())
    assert even[0] == 0 and even[1] < 0.05
    assert odd[0] == 1 and odd[1] > 0.05
    assert "token_embedding/embeddings" in odd[2]
    assert "the devices don't divide these" in odd[3]


SENDING = """
import json, sys
sys.path.insert(0, "benchmarks")
import sharding
row = sharding.measure("8x1 fsdp", sharding.QUICK_MODEL, 2, 16)
with open(sys.argv[1], "w") as file:
    json.dump(row, file)
"""


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
def test_devices_send_no_more_than_they_need(tmp_path):
    target = tmp_path / "row.json"
    run_on_devices(8, SENDING, target)
    row = json.loads(target.read_text())
    # Weights are gathered twice, of a small model that is not all.
    assert 0.5 < row["x least of FSDP"] < 1.3
    assert row["all-gather MB"] < 2.5 * row["weights MB"]


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize(
    "layout", [FSDP, TWO_D, {"mesh": {"data": 8}, "strategy": "data"}]
)
def test_every_strategy(layout, lora_rank, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    run_one(run_dir=one, lora_rank=lora_rank)
    run_one(8, run_dir=many, lora_rank=lora_rank, **layout)
    assert_same(many, one)


@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="one only")
def test_a_process_with_other_data_is_refused(tmp_path):
    options = FSDP if keras.backend.backend() == "jax" else {}
    status, outputs = run_two(
        4, run_dir=tmp_path, others={"seed": 1}, **options
    )
    assert 0 not in status
    for output in outputs:
        assert "have to have the same code, data and settings" in output
        assert "data: " in output


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")
@pytest.mark.parametrize("moment", ["step", "generation", "save"])
def test_a_killed_process_ends_the_others_and_loses_nothing(moment, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    run_one(run_dir=one)
    start = time.monotonic()
    status, outputs = run_two(4, run_dir=many, others={"kill": moment}, **FSDP)
    assert status[1] == -signal.SIGKILL
    assert status[0] not in (0, None)
    # Half a minute without a heartbeat, and the time until the kill.
    assert time.monotonic() - start < 150
    assert re.search("heartbeat|another task died", outputs[0])
    status, outputs = run_two(4, run_dir=many, **FSDP)
    assert status == [0, 0], outputs[0][-3000:]
    kept = {}
    for line in map(json.loads, open(many / "metrics.jsonl")):
        if line["kind"] == "step":
            kept[line["step"]] = line["loss"]
    np.testing.assert_allclose(
        [kept[i] for i in sorted(kept)], read_losses(one), atol=LOSS_TOLERANCE
    )
