"""Estimates against what real models take."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest
from programs import environment
from tiny_checkpoints import save_checkpoint

import keras_iris
from keras_iris import losses
from keras_iris.hub.checkpoint import read_json
from keras_iris.hub.decoder_config import DecoderConfig
from keras_iris.run_estimate import RunEstimate

RECIPES = Path(__file__).parents[1] / "recipes"

# Published sizes; the numbers of weights are those of the model cards.
ZEPHYR = DecoderConfig.from_json(
    {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
)
QWEN = DecoderConfig.from_json(
    {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
)
EIGHT = {"mesh": {"data": 8}}
GIB = 2**30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def _estimate(config, **changes):
    options = dict(
        num_prompts=1000,
        prompt_length=100.0,
        response_length=60.0,
        new_tokens=40,
        max_length=2048,
        iterations=3,
        epochs=2,
        micro_batch_size=4,
        generation_batch_size=16,
    )
    is_whole = changes.get("lora_rank") is None
    options["dtype"] = "mixed_bfloat16" if is_whole else "bfloat16"
    return RunEstimate(config=config, **{**options, **changes})


def _bytes(variables):
    return sum(
        math.prod(v.shape)
        * ITEM_BYTES[keras.backend.standardize_dtype(v.dtype)]
        for v in variables
    )


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "llama", "gemma"])
@pytest.mark.parametrize("lora_rank", [None, 4])
def test_memory_of_variables(architecture, lora_rank, checkpoint):
    folder = checkpoint(architecture)
    causal_lm = keras_iris.load(
        folder,
        dtype="mixed_bfloat16" if lora_rank is None else "bfloat16",
        lora_rank=lora_rank,
    )
    config = DecoderConfig.from_json(read_json(folder / "config.json"))
    estimate = _estimate(config, lora_rank=lora_rank)
    trained = causal_lm.trainable_variables
    assert estimate.num_trained == sum(math.prod(v.shape) for v in trained)
    memory = estimate.memory()
    assert memory["weights"] == _bytes(causal_lm.backbone.weights)
    optimizer = keras.optimizers.RMSprop()
    optimizer.build(trained)
    slots = [v for v in optimizer.variables if len(v.shape)]
    assert memory["optimizer"] == _bytes(slots)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "mixed_bfloat16"])
def test_memory_is_that_of_the_dtype(dtype, checkpoint):
    folder = checkpoint("qwen2")
    options = {"dtype": dtype, "lora_rank": 4}
    causal_lm = keras_iris.load(folder, **options)
    memory = keras_iris.estimate(folder, **options, is_gpu=False).memory()
    assert memory["weights"] == _bytes(causal_lm.backbone.weights)
    assert ("bfloat16 copies" in memory) == (dtype == "mixed_bfloat16")


def test_hours_are_told_where_rates_are_known():
    estimate = _estimate(QWEN)
    assert "hours at 5e+14" in str(estimate)
    for rates in ({}, {"flops_per_second": 1e11}):
        on_cpu = _estimate(QWEN, is_gpu=False, **rates)
        assert on_cpu.seconds() == {} and "hours" not in str(on_cpu)
    rates |= {"bytes_per_second": 1e10}
    on_cpu = _estimate(QWEN, is_gpu=False, **rates)
    assert on_cpu.seconds()["training"] > estimate.seconds()["training"]


@pytest.mark.slow
def test_memory_of_quantized_weights(checkpoint):
    folder = checkpoint("qwen2")
    causal_lm = keras_iris.load(
        folder, dtype="bfloat16", lora_rank=4, quantize="int8"
    )
    config = DecoderConfig.from_json(read_json(folder / "config.json"))
    estimate = _estimate(config, lora_rank=4, quantize="int8")
    # The scales of tiny matrices are many for so few numbers.
    variables = [
        v for v in causal_lm.backbone.weights if not v.name.endswith("_scale")
    ]
    assert estimate.memory()["weights"] == _bytes(variables)


@pytest.mark.parametrize(
    ("config", "num_weights", "full", "lora", "quantized"),
    [
        (ZEPHYR, 7_241_732_096, 107.9, 13.5, 6.9),
        (QWEN, 3_085_938_688, 46.0, 5.7, 3.2),
    ],
)
def test_memory_of_the_papers_models(
    config, num_weights, full, lora, quantized
):
    estimate = _estimate(config, optimizer_slots=2)
    assert estimate.num_weights == num_weights
    memory = estimate.memory()
    # Weights, gradients and Adam's two slots, 4 bytes each.
    sixteen = ("weights", "gradients", "optimizer")
    assert sum(memory[n] for n in sixteen) / GIB == pytest.approx(full, abs=0.1)
    for quantize, expected in ((None, lora), ("int8", quantized)):
        estimate = _estimate(config, lora_rank=16, quantize=quantize)
        base = estimate.memory()["weights"] - 4 * estimate.num_trained
        assert base / GIB == pytest.approx(expected, abs=0.1)


def test_memory_of_answers():
    # 32 layers, keys and values, 8 heads of 128, bfloat16; answers of 8
    # prompts a row.
    token = 32 * 2 * 8 * 128 * 2
    answers = _estimate(ZEPHYR, max_length=10_040).memory()["answers"]
    # What an eighth of the rows adds as it begins: keys and values once more,
    # and for 64 tokens hidden states, and attention's products three times,
    # 32 heads, float32.
    block = 64 * (2 * 4096 * 2 + 3 * 32 * 10_000 * 4)
    begin = (10_040 * token + block) / 8
    assert answers == 16 * (10_040 * token + 8 * 8 * 40 + begin)
    answers = _estimate(ZEPHYR, max_length=300, new_tokens=299).memory()
    logits = 3 * 32000 * 4
    begin = (300 * token + 2 * 4096 * 2 + 3 * 4 * 14336) / 8
    assert answers["answers"] == 16 * (
        300 * token + 8 * 8 * 299 + max(logits, begin)
    )
    # Each device has rows, and prompts for them, of its own.
    eight = _estimate(ZEPHYR, max_length=300, new_tokens=299, mesh={"data": 8})
    assert eight.memory()["answers"] == answers["answers"] / 8


def test_answers_fit_into_the_memory_of_training():
    for mesh in ({}, {"data": 8}):
        memory = _estimate(
            QWEN, generation_batch_size=None, mesh=mesh, strategy="data"
        ).memory()
        # A power of two of rows, in 0.8 of what is free.
        free = memory["training"] - (memory["generation"] - memory["answers"])
        assert 0.4 * free < memory["answers"] <= 0.8 * free


def test_passes_of_objectives():
    def estimate(loss):
        return _estimate(ZEPHYR, lora_rank=16, loss=loss)

    def seconds(loss):
        return estimate(loss).seconds()

    iris, anchored = losses.IRIS(), losses.IRIS(sft_weight=1.0)
    for name, time in seconds(iris).items():
        extra = 0
        if name in ("training", "together"):  # annotated responses once more
            extra = seconds(iris)["training"] * 160 / 300
        assert seconds(anchored)[name] == pytest.approx(time + extra)
    for loss in (losses.SPIN(), losses.SPIN(sft_weight=1.0)):
        assert seconds(loss) == seconds(iris)
    # A third response, of 140 tokens with its prompt.
    for name in ("scoring", "training"):
        assert seconds(losses.TSPIN())[name] == pytest.approx(
            seconds(iris)[name] * 440 / 300
        )
    # One sum of gradients where there is one term.
    memory = estimate(losses.SPIN()).memory()
    assert memory["gradients of earlier terms"] == 0
    assert memory["activations"] == estimate(iris).memory()["activations"]
    assert estimate(losses.TSPIN()).memory()["activations"] == pytest.approx(
        1.5 * memory["activations"]
    )


def test_the_measured_run():
    """Qwen2.5-3B's shape on an H200; queries and values had adapters."""
    estimate = _estimate(QWEN, lora_rank=16, max_length=576, micro_batch_size=8)
    assert estimate.memory()["training"] == pytest.approx(17.2e9, rel=0.15)
    # 50,000 pairs of 576 tokens each took 29,000 tokens a second.
    estimate = RunEstimate(
        config=QWEN,
        prompt_length=288,
        response_length=288,
        new_tokens=288,
        lora_rank=16,
        dtype="bfloat16",
        iterations=1,
        epochs=1,
    )
    tokens = estimate.num_prompts * 2 * 576
    speed = tokens / estimate.seconds()["training"]
    assert speed == pytest.approx(29_000, rel=0.15)


LIKE_A_GPU = environment(
    # See `keras_iris.models.remat`.
    XLA_FLAGS="--xla_cpu_enable_concurrency_optimized_scheduler=false",
    JAX_DISABLE_MOST_OPTIMIZATIONS="0",
)
ALLOCATED = """
import json, sys
import jax, keras, numpy as np
import keras_iris

folder, micro_batch_size, length, lora_rank, loss = json.loads(sys.argv[1])
loss = keras.losses.deserialize(loss)
causal_lm = keras_iris.load(
    folder,
    dtype="bfloat16" if lora_rank else "mixed_bfloat16",
    lora_rank=lora_rank,
    remat=True,
)
model = keras_iris.SelfPlayModel(causal_lm)
model.compile(
    optimizer=keras.optimizers.RMSprop(1e-3),
    loss=loss,
    micro_batch_size=micro_batch_size,
)
shape = (4 * micro_batch_size, loss.max_responses, length)
x = {"token_ids": np.ones(shape, "int32")}
x["padding_mask"] = x["response_mask"] = np.ones(shape, bool)
batch = (x, np.zeros(shape[:2], "float32"))
model._symbolic_build(data_batch=batch)
model.optimizer.build(model.trainable_variables)
kinds = ("trainable", "non_trainable", "optimizer", "metrics")
state = model._get_jax_state(**{f"{kind}_variables": True for kind in kinds})
step = jax.jit(model.train_step, donate_argnums=0)
memory = step.lower(state, batch).compile().memory_analysis()
print(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's figures")
@pytest.mark.parametrize(
    ("architecture", "lora_rank", "loss"),
    [
        ("qwen2", 4, losses.IRIS()),
        ("qwen2", None, losses.IRIS(sft_weight=1.0)),
        ("qwen2", None, losses.TSPIN()),
        ("mistral", 4, losses.IRIS()),
    ],
)
def test_what_xla_allocates(architecture, lora_rank, loss, tmp_path):
    sizes = dict(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    if architecture == "mistral":
        sizes |= dict(hidden_size=512, num_hidden_layers=4)
    folder = save_checkpoint(tmp_path, architecture, **sizes)
    micro_batch_size, length = 4, 256
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            ALLOCATED,
            json.dumps(
                [
                    str(folder),
                    micro_batch_size,
                    length,
                    lora_rank,
                    keras.losses.serialize(loss),
                ]
            ),
        ],
        env=LIKE_A_GPU,
        check=True,
        stdout=subprocess.PIPE,
    )
    estimate = RunEstimate(
        config=DecoderConfig.from_json(read_json(folder / "config.json")),
        micro_batch_size=micro_batch_size,
        max_length=length,
        lora_rank=lora_rank,
        dtype="bfloat16" if lora_rank else "mixed_bfloat16",
        loss=loss,
        is_gpu=False,
    )
    allocated = float(result.stdout.split()[-1])
    assert estimate.memory()["training"] == pytest.approx(allocated, rel=0.15)


DECODING = """
import json, sys
import jax, keras, numpy as np
from tiny_models import make_causal_lm
from keras_iris.generation.batch_rows import read_sizes, row_bytes
from keras_iris.generation.decoder import Decoder

architecture, time, new, vocabulary_size = json.loads(sys.argv[1])
causal_lm = make_causal_lm(
    architecture,
    vocabulary_size=vocabulary_size,
    num_query_heads=8,
    hidden_dim=64,
    intermediate_dim=256,
)
decoder = Decoder(
    causal_lm,
    temperature=1.0,
    end_token_ids=(2,),
    max_new_tokens=new,
    pad_token_id=0,
)
variables = causal_lm.trainable_variables, causal_lm.non_trainable_variables

def answer(inputs, *values):
    pairs = [
        pair
        for group, state in zip(variables, values)
        for pair in zip(group, state)
    ]
    with keras.StatelessScope(state_mapping=pairs):
        return decoder.generate_step(inputs, (2,))

def allocated(rows):
    size = rows * decoder.waves
    inputs = {
        "prompts": np.ones((size, time), "int32"),
        "lengths": np.full(size, time, "int32"),
        "is_active": np.ones(size, bool),
        "noise": np.zeros((size, 2 * new), "float32"),
    }
    values = ([v.value for v in group] for group in variables)
    program = jax.jit(answer).lower(inputs, *values).compile()
    return program.memory_analysis().temp_size_in_bytes

counted = row_bytes(
    read_sizes(causal_lm.backbone),
    prompt_length=time,
    new_tokens=new,
)
print((allocated(64) - allocated(32)) / 32, counted)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's figures")
@pytest.mark.parametrize(
    "shape",
    [
        ("qwen", 16, 512, 500),  # keys and values
        ("gemma", 16, 512, 500),  # KerasHub's own pass
        ("qwen", 8, 8, 20_000),  # logits
        ("qwen", 256, 8, 500),  # attention
        ("qwen", 48, 8, 500),  # the feed-forward network
    ],
)
def test_what_xla_allocates_for_a_row(shape):
    """From 32 rows to 64, whatever there is once."""
    result = subprocess.run(
        [sys.executable, "-c", DECODING, json.dumps(shape)],
        env=LIKE_A_GPU,
        check=True,
        stdout=subprocess.PIPE,
    )
    allocated, counted = map(float, result.stdout.split()[-2:])
    # Upper bounds: KerasHub's own pass differs between models, and of attention
    # a CPU keeps fewer copies than are counted.
    if shape[0] == "gemma" or shape[1] == 256:
        assert counted > 0.85 * allocated
    else:
        assert counted == pytest.approx(allocated, rel=0.15)


def test_memory_of_shards():
    one, eight = (_estimate(ZEPHYR, mesh={"data": n}).memory() for n in (1, 8))
    shared = one.pop("logits")
    for name in one.keys() - {"gathered weights", "answers", "generation"}:
        rest = shared if name == "training" else 0
        assert eight[name] - rest == pytest.approx((one[name] - rest) / 8)


def test_memory_of_weights_by_strategy():
    def memory(mesh, **options):
        found = _estimate(
            ZEPHYR, dtype="mixed_bfloat16", mesh=mesh, **options
        ).memory()
        return [found[n] for n in ("weights", "gathered weights", "gradients")]

    num, eight = 7_241_732_096, {"data": 8}
    assert memory({}) == [4 * num, 0, 4 * num]
    assert memory(eight) == [4 * num / 8, 2 * num, 4 * num / 8]
    assert memory(eight, strategy="data") == memory({})
    both = {"data": 2, "model": 4}
    assert memory(both, strategy="2d") == [num / 2, 2 * num / 4, num / 2]
    # Nothing is cut over one device of data.
    assert memory({"data": 1, "model": 8}, strategy="2d")[1] == 0
    # An int8 base is gathered as it is.
    base = memory(eight, lora_rank=16, quantize="int8")
    assert base[1] == pytest.approx(8 * base[0])


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": {"data": 8}, "strategy": "fdsp"},
        {"mesh": {"batch": 8}},
        {"mesh": {"data": 0}},
        {"mesh": {"data": 2, "model": 2}},
    ],
)
def test_a_mesh_that_cannot_be(options):
    with pytest.raises(ValueError, match="`(mesh|strategy)` has to be"):
        _estimate(ZEPHYR, **options)


GATHERING = """
import json, sys
import jax, keras, numpy as np
from keras_iris.distribution import make_distribution
from keras_iris.generation.batch_rows import gathered_bytes
from keras_iris.generation.decoder import Decoder
from tiny_models import make_causal_lm

mesh, strategy = json.loads(sys.argv[1])

def allocated(num_rows):
    causal_lm = make_causal_lm(
        num_layers=4, hidden_dim=512, intermediate_dim=2048
    )
    variables = causal_lm.variables
    decoder = Decoder(
        causal_lm,
        temperature=1.0,
        end_token_ids=(2,),
        max_new_tokens=4,
        pad_token_id=0,
    )
    size = num_rows * decoder.waves
    inputs = {
        "prompts": np.ones((size, 8), "int32"),
        "lengths": np.full(size, 8, "int32"),
        "is_active": np.ones(size, bool),
        "noise": np.zeros((size, 8), "float32"),
    }

    def answer(inputs, values):
        mapping = zip(variables, values, strict=True)
        with keras.StatelessScope(state_mapping=mapping):
            return decoder.generate_step(inputs, (2,))

    values = [v.value for v in variables]
    program = jax.jit(answer).lower(inputs, values).compile()
    memory = program.memory_analysis().temp_size_in_bytes
    return memory, gathered_bytes(variables, 4)

one, nothing = allocated(4)
assert nothing == 0
keras.distribution.set_distribution(make_distribution(mesh, strategy))
four, counted = allocated(4 * mesh["data"])
print(four - one, counted)
"""


@pytest.mark.slow
@pytest.mark.multi_device
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="XLA's figures")
@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [({"data": 4}, "fsdp"), ({"data": 2, "model": 2}, "2d")],
)
def test_what_xla_gathers_to_generate(mesh, strategy):
    result = subprocess.run(
        [sys.executable, "-c", GATHERING, json.dumps([mesh, strategy])],
        env=environment(4),
        check=True,
        stdout=subprocess.PIPE,
    )
    allocated, counted = map(float, result.stdout.split()[-2:])
    assert counted == pytest.approx(allocated, rel=0.15)


@pytest.mark.parametrize(
    ("recipe", "config", "line", "changes"),
    [
        ("zephyr_7b", ZEPHYR, "LoRA of rank 16", {"lora_rank": 16}),
        (
            "zephyr_7b",
            ZEPHYR,
            "LoRA, int8 base",
            {"lora_rank": 16, "quantize": "int8"},
        ),
        ("zephyr_7b", ZEPHYR, "all weights, on 8 devices", EIGHT),
        ("qwen2_5_3b", QWEN, "LoRA of rank 16", {"lora_rank": 16}),
        ("qwen2_5_3b", QWEN, "all weights", {}),
        ("qwen2_5_3b", QWEN, "all weights, on 8 devices", EIGHT),
    ],
)
def test_memory_that_the_recipes_tell(recipe, config, line, changes):
    text = (RECIPES / f"{recipe}.py").read_text()
    [told] = re.findall(rf"^ +{re.escape(line)} +(\d+) GiB$", text, re.M)
    memory = _estimate(
        config, micro_batch_size=8, generation_batch_size=None, **changes
    ).memory()
    largest = max(memory["training"], memory["generation"])
    assert round(largest / GIB) == int(told)


def test_disk():
    num_weights = 7_241_732_096
    disk = _estimate(ZEPHYR, needs_folder=True).disk()
    assert disk["checkpoints"] == 4 * 8 * num_weights
    assert disk["engine's model"] == 2 * disk["trained model"]
    assert disk["trained model"] == 2 * num_weights
    assert disk["tokens"] == 4 * 1000 * (160 + 3 * 40)
    disk = _estimate(ZEPHYR, num_samples=2).disk()
    assert disk["tokens"] == 4 * 1000 * (160 + 3 * 2 * 40)
    assert _estimate(ZEPHYR).disk()["engine's model"] == 0


def test_a_disk_without_room(checkpoint, tmp_path, monkeypatch):
    preset, run_dir = checkpoint("qwen2"), tmp_path / "new" / "run"
    parts = keras_iris.estimate(preset, run_dir=run_dir).disk()
    assert parts.pop("together") == sum(parts.values())
    free = {tmp_path: math.ceil(sum(parts.values()))}
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(free=free[path])
    )
    keras_iris.estimate(preset, run_dir=run_dir)
    free[tmp_path] -= 1
    with pytest.raises(ValueError, match=r"GiB of disk in .*run, of which"):
        keras_iris.estimate(preset, run_dir=run_dir)
    assert not run_dir.parent.exists()


def test_seconds():
    def seconds(**changes):
        return _estimate(
            ZEPHYR, flops_per_second=1e14, bytes_per_second=1e12, **changes
        ).seconds()

    # Matrices alone: the embeddings are only looked up.
    forward = 2 * (7_241_732_096 - 32000 * 4096) / 1e14
    pairs = 1000 * (100 + 60 + 100 + 40)
    plain = seconds()
    # Forward, again for remat, and backward as two.
    assert plain["training"] == pytest.approx(3 * 2 * 4 * forward * pairs)
    assert plain["scoring"] == pytest.approx(3 * forward * pairs)
    # 16 answers for a reading of the weights, and of keys and values half-way;
    # prompts at once.
    step = 4 * 7_241_732_096 / 1e12 / 16 + 120 * 2 * 32 * 8 * 128 * 2 / 1e12
    assert step > forward
    assert plain["generation"] == pytest.approx(
        3 * 1000 * (100 * forward + 40 * step)
    )
    for name, time in seconds(num_samples=3).items():
        assert time == pytest.approx(3 * plain[name])
    assert seconds(lora_rank=16)["training"] == pytest.approx(
        plain["training"] * 3 / 4
    )
    for name, time in seconds(mesh={"data": 8}).items():
        assert time == pytest.approx(plain[name] / 8)
