"""Every row of the table of architectures against transformers.

`make matrix` writes the results of this file into docs/architectures.md: a
test's name is a column, its parameter a row.
"""

import json
import re
import tempfile

import keras
import numpy as np
import pytest
from reference import (
    check_greedy,
    expected_logits,
    expected_model,
    logits_of,
    random_ids,
    take_step,
)
from safetensors.numpy import load_file
from tiny_checkpoints import copy, edit, find_classes, non_default_options
from tiny_models import make_pairs

from keras_iris import SelfPlayModel, losses
from keras_iris.hub import export, load
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.decoder_config import DecoderConfig

# float32 sums in another order; logits are of size 3
TOLERANCE = 1e-5
NUM_NEW_TOKENS = 64


# The others, whose parts these have, are slow tests; `make matrix` runs all.
FAST = ("qwen2_moe", "qwen3")
ROWS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in ARCHITECTURES
]


@pytest.fixture(scope="module", params=ROWS)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def folder(checkpoint, architecture):
    return checkpoint(architecture, **non_default_options(architecture))


@pytest.fixture(scope="module")
def causal_lm(folder):
    """Its weights are never changed."""
    return load(folder, dtype="float32")


def test_loads(architecture, folder, causal_lm):
    """Names, shapes and defaults of the row are transformers' own."""
    config = json.loads((folder / "config.json").read_text())
    read = DecoderConfig.from_json(config)
    weights = load_file(folder / "model.safetensors")
    assert read.weight_shapes() == {k: v.shape for k, v in weights.items()}
    assert DecoderConfig.from_json(read.to_json()) == read
    row = ARCHITECTURES[architecture]
    default = find_classes(architecture)[1]()
    for entry in [*row.arguments, *row.adjusted]:
        # What KerasHub has one value for is refused otherwise.
        if entry not in row.expected and hasattr(default, entry):
            assert read.entries[entry] != getattr(default, entry), entry
    for entry, value in row.defaults.items():
        if value is not None and hasattr(default, entry):
            assert (getattr(default, entry) or value) == value, entry
    backbone = causal_lm.backbone
    again = type(backbone).from_config(backbone.get_config())
    again.set_weights(backbone.get_weights())
    inputs = {"token_ids": random_ids(), "padding_mask": np.ones((2, 40))}
    np.testing.assert_array_equal(
        *(keras.ops.convert_to_numpy(b(inputs)) for b in (again, backbone))
    )


def test_logits(folder, causal_lm):
    token_ids = random_ids()
    expected = expected_logits(folder, token_ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        logits_of(causal_lm, token_ids), expected, rtol=0, atol=TOLERANCE
    )


def test_generates(folder, causal_lm):
    check_greedy(causal_lm, folder, NUM_NEW_TOKENS)


def test_trains_and_exports(checkpoint, architecture, tmp_path):
    """One step of SGD is PyTorch's, read from the exported folder."""
    options = non_default_options(architecture)
    if "router_aux_loss_coef" in options:
        options["output_router_logits"] = False  # has its own test
    folder = checkpoint(architecture, **options)
    causal_lm = load(folder, dtype="float32")
    model = SelfPlayModel(causal_lm)
    model.compile(keras.optimizers.SGD(0.1), losses.SFT(), jit_compile=False)
    pairs = make_pairs(batch_size=2)
    model.train_on_batch(pairs, np.zeros((2, 2), "float32"))
    new = export(causal_lm, tmp_path / "model", dtype="float32")
    expected = _expected_step(expected_model(folder), pairs)
    step, start = (load_file(f / "model.safetensors") for f in (new, folder))
    for name in start:
        np.testing.assert_allclose(
            step[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name
        )
    moved = [n for n, a in start.items() if not np.array_equal(a, step[n])]
    assert len(moved) > 0.9 * len(start)
    token_ids = random_ids()
    logits = logits_of(causal_lm, token_ids)
    np.testing.assert_array_equal(
        logits_of(load(new, dtype="float32"), token_ids), logits
    )
    np.testing.assert_allclose(
        expected_logits(new, token_ids), logits, rtol=0, atol=TOLERANCE
    )


def _expected_step(model, pairs):
    take_step(model, pairs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def test_exports_without_source(folder, causal_lm, tmp_path):
    causal_lm.source, source = None, causal_lm.source
    new = export(causal_lm, tmp_path / "model", dtype="float32")
    causal_lm.source = source
    config, original = (
        json.loads((f / "config.json").read_text()) for f in (new, folder)
    )
    for name in ("max_position_embeddings", "bos_token_id"):
        assert config.get(name) == original[name]
    ends = causal_lm.tokenizer.end_token_ids
    assert config["eos_token_id"] == ends[0]
    generation = json.loads((new / "generation_config.json").read_text())
    assert tuple(generation["eos_token_id"]) == ends
    token_ids = random_ids()
    np.testing.assert_array_equal(
        expected_logits(new, token_ids), expected_logits(folder, token_ids)
    )


def test_adapters(folder, causal_lm, tmp_path):
    """Merged by the export, they give the logits that they give here."""
    adapted = load(folder, dtype="float32", lora_rank=2)
    assert adapted.trainable_variables
    assert all("lora" in v.name for v in adapted.trainable_variables)
    rng = np.random.default_rng(0)
    for variable in adapted.trainable_variables:
        variable.assign(rng.normal(0, 0.1, variable.shape))
    token_ids = random_ids()
    logits = logits_of(adapted, token_ids)
    difference = np.abs(logits - logits_of(causal_lm, token_ids)).max()
    assert difference > 100 * TOLERANCE
    new = export(adapted, tmp_path / "model", dtype="float32")
    np.testing.assert_allclose(
        expected_logits(new, token_ids), logits, rtol=0, atol=TOLERANCE
    )


def test_refuses_what_it_does_not_know(checkpoint, architecture, tmp_path):
    """Entries that the row doesn't have, and other values of fixed ones."""
    options = non_default_options(architecture)
    folder = copy(checkpoint(architecture, **options), tmp_path)
    edit(folder / "config.json", residual_multiplier=0.5)
    with pytest.raises(ValueError, match="residual_multiplier=0.5, an entry"):
        load(folder)
    edit(folder / "config.json", residual_multiplier=None)
    content = json.loads((folder / "config.json").read_text())
    for entry, value in ARCHITECTURES[architecture].expected.items():
        others = {str: "relu", bool: not value, int: 2, list: [1]}
        other = others[type(value)]
        edit(folder / "config.json", **{entry: other})
        message = re.escape(f"has {entry}={other!r}, expected")
        with pytest.raises(ValueError, match=message):
            load(folder)
        edit(folder / "config.json", **{entry: content.get(entry)})
