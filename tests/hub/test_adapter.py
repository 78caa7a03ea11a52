"""Adapters saved and loaded, also through `peft` where it's installed."""

import keras
import numpy as np
import pytest
import torch
from reference import expected_model, logits_of, random_ids
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import edit

from keras_iris.hub import load, load_adapter, save_adapter

RANK = 2
TOLERANCE = 1e-5
ARCHITECTURES = ("mistral", "qwen2", "llama", "gemma")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
PEFT_WEIGHTS = "adapter_model.safetensors"


def load_trained(folder, seed=0):
    causal_lm = load(folder, dtype="float32", lora_rank=RANK)
    rng = np.random.default_rng(seed)
    for variable in causal_lm.trainable_variables:
        variable.assign(rng.normal(0, 0.05, variable.shape))
    return causal_lm


def values(causal_lm):
    variables = causal_lm.backbone.trainable_variables
    return {v.path: keras.ops.convert_to_numpy(v) for v in variables}


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter"])
@every_architecture
def test_round_trip(checkpoint, tmp_path, architecture, name):
    folder = checkpoint(architecture)
    causal_lm = load_trained(folder)
    path = save_adapter(causal_lm, tmp_path / "new" / name)
    save_adapter(causal_lm, path)  # replaces its own
    assert [file.name for file in path.parent.iterdir()] == [name]
    other = load_trained(folder, seed=1)
    load_adapter(other, path)
    for path, value in values(causal_lm).items():
        np.testing.assert_array_equal(values(other)[path], value)


def test_file_holds_all_that_is_trained(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"))
    path = save_adapter(causal_lm, tmp_path / "all.safetensors")
    arrays = load_file(path)
    assert set(arrays) == {v.path for v in causal_lm.backbone.variables}
    with pytest.raises(ValueError, match="LoRA adapters only"):
        save_adapter(causal_lm, tmp_path / "peft")
    assert [file.name for file in tmp_path.iterdir()] == ["all.safetensors"]


@every_architecture
def test_peft_layout_by_its_formula(checkpoint, tmp_path, architecture):
    # W + alpha / r * B @ A, with what the configuration says for each module
    folder = checkpoint(architecture)
    causal_lm = load_trained(folder)
    path = save_adapter(causal_lm, tmp_path / "adapter")
    model = expected_model(folder)
    weights = dict(model.named_parameters())
    config = _read(path / "adapter_config.json")
    arrays = load_file(path / PEFT_WEIGHTS)
    assert len(arrays) == 8
    for name, a in arrays.items():
        if ".lora_A." in name:
            module = name.split(".")[-3]
            rank = config["rank_pattern"][module]
            assert a.shape[0] == rank
            scale = config["alpha_pattern"][module] / rank
            delta = scale * arrays[name.replace("lora_A", "lora_B")] @ a
            key = name.removeprefix("base_model.model.")
            key = key.replace(".lora_A", "")
            weights[key].data += torch.tensor(delta)
    _assert_same_logits(causal_lm, model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between the two
@every_architecture
def test_peft_opens_it(checkpoint, tmp_path, architecture):
    peft = pytest.importorskip("peft", reason="peft isn't installed")
    folder = checkpoint(architecture)
    causal_lm = load_trained(folder)
    path = save_adapter(causal_lm, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(expected_model(folder), path)
    _assert_same_logits(causal_lm, model)


def _assert_same_logits(causal_lm, model):
    token_ids = random_ids()
    with torch.no_grad():
        expected = model(torch.tensor(token_ids.astype("int64"))).logits
    np.testing.assert_allclose(
        logits_of(causal_lm, token_ids),
        expected.numpy(),
        rtol=0,
        atol=TOLERANCE,
    )


def _read(file):
    from keras_iris.data.text_files import read_json

    return read_json(file)


def test_refuses_what_does_not_fit(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    causal_lm = load_trained(folder)
    before = values(causal_lm)
    file = save_adapter(causal_lm, tmp_path / "a.safetensors")
    peft = save_adapter(causal_lm, tmp_path / "peft")
    other = load(folder, dtype="float32", lora_rank=RANK + 1)
    with pytest.raises(ValueError, match="doesn't fit the model"):
        load_adapter(other, file)
    with pytest.raises(ValueError, match="isn't of the shapes"):
        load_adapter(other, peft)
    arrays = load_file(peft / PEFT_WEIGHTS)
    name = next(name for name in arrays if "lora_B" in name)
    arrays[name] = arrays[name] + 1.0
    save_file(arrays, peft / PEFT_WEIGHTS)
    with pytest.raises(ValueError, match="aren't shared by the heads"):
        load_adapter(causal_lm, peft)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot be read as a safetensors"):
        load_adapter(causal_lm, file)
    with pytest.raises(ValueError, match="cannot be read as a safetensors"):
        load_adapter(causal_lm, tmp_path / "none.safetensors")
    for path, value in values(causal_lm).items():
        np.testing.assert_array_equal(before[path], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(use_rslora=True), "has use_rslora=true"),
        (dict(use_dora=True), "has use_dora=true"),
        (dict(peft_type="LOHA"), "the peft_type 'LOHA'"),
        (dict(alpha_pattern={"0.self_attn.q_proj": 1}), "alpha_pattern '0.s"),
    ],
)
def test_refuses_adapters_that_count_otherwise(
    checkpoint, tmp_path, changes, message
):
    causal_lm = load_trained(checkpoint("qwen2"))
    path = save_adapter(causal_lm, tmp_path / "peft")
    edit(path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(causal_lm, path)
    assert "keras_iris.hub.save_adapter" in str(caught.value)


def test_refuses_a_folder_without_config(checkpoint, tmp_path):
    causal_lm = load_trained(checkpoint("qwen2"))
    path = save_adapter(causal_lm, tmp_path / "peft")
    (path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="the peft_type None"):
        load_adapter(causal_lm, path)


def test_nothing_is_trained(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"))
    causal_lm.trainable = False
    with pytest.raises(ValueError, match="no trainable variables"):
        save_adapter(causal_lm, tmp_path / "a.safetensors")
    causal_lm.trainable = True


def test_does_not_replace_other_folders(checkpoint, tmp_path):
    causal_lm = load_trained(checkpoint("qwen2"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="wasn't written by keras_iris"):
        save_adapter(causal_lm, tmp_path)
