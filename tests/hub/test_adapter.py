"""Adapters to and from `peft`, which is what they are compared with."""

import json

import numpy as np
import peft
import pytest
import torch
from reference import expected_model, logits_of, random_ids
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import edit

from keras_iris.hub import export, load, load_adapter, save_adapter
from keras_iris.models import Lora
from keras_iris.models.lora import find_lora

# transformers' own, which peft makes it give
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient:FutureWarning")

TOLERANCE = 1e-5
ARCHITECTURES = ("mistral", "qwen2", "llama", "gemma")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
WEIGHTS = "adapter_model.safetensors"
ALL = ("query", "key", "value", "output", "gate", "up", "down")


def make_peft(folder, **options):
    """A model of transformers with random adapters."""
    model = peft.get_peft_model(
        expected_model(folder), peft.LoraConfig(**options)
    )
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    return model.eval()


def logits_of_torch(model):
    with torch.no_grad():
        ids = torch.tensor(random_ids().astype("int64"))
        return model(ids).logits.float().numpy()


def assert_same(left, right):
    np.testing.assert_allclose(left, right, rtol=0, atol=TOLERANCE)


@every_architecture
def test_from_peft_and_back(checkpoint, tmp_path, architecture):
    folder = checkpoint(architecture)
    model = make_peft(folder, r=3, lora_alpha=7, target_modules="all-linear")
    model.save_pretrained(tmp_path / "peft")
    logits = logits_of_torch(model)

    causal_lm = load(folder, dtype="float32")
    assert np.abs(logits_of(causal_lm, random_ids()) - logits).max() > 0.1
    load_adapter(causal_lm, tmp_path / "peft")
    assert find_lora(causal_lm.backbone) == Lora(3, 7, ALL)
    assert len(causal_lm.trainable_variables) == 2 * 7 * 2
    assert_same(logits_of(causal_lm, random_ids()), logits)

    path = save_adapter(causal_lm, tmp_path / "new" / "ours")
    save_adapter(causal_lm, path)  # replaces its own
    arrays, expected = (
        load_file(f / WEIGHTS) for f in (path, tmp_path / "peft")
    )
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
    again = peft.PeftModel.from_pretrained(expected_model(folder), path)
    assert_same(logits_of_torch(again), logits)

    merged = export(causal_lm, tmp_path / "merged", dtype="float32")
    assert_same(logits_of_torch(model.merge_and_unload()), logits)
    assert_same(logits_of_torch(expected_model(merged)), logits)


def test_onto_adapters_that_are_there(checkpoint, tmp_path):
    folder = checkpoint("qwen2")
    # bfloat16 factors, rank-stabilised: alpha / sqrt(rank)
    model = make_peft(
        folder,
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["o_proj", "up_proj"],
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "peft")
    options = dict(
        dtype="float32",
        lora_rank=4,
        lora_alpha=6,
        lora_targets=("up", "output"),
    )
    causal_lm = load(folder, **options)
    load_adapter(causal_lm, tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(
        expected_model(folder), tmp_path / "peft"
    )
    assert_same(logits_of(causal_lm, random_ids()), logits_of_torch(model))
    for option, value in (("lora_alpha", 8), ("lora_rank", 2)):
        other = load(folder, **{**options, option: value})
        with pytest.raises(ValueError, match="or without `lora_rank`"):
            load_adapter(other, tmp_path / "peft")


@pytest.fixture(scope="module")
def causal_lm(checkpoint):
    return load(checkpoint("qwen2"), dtype="float32")


@pytest.fixture
def adapter(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"), dtype="float32", lora_rank=2)
    return save_adapter(causal_lm, tmp_path / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        dict(use_dora=True),
        dict(rank_pattern={"q_proj": 4}),
        dict(alpha_pattern={"q_proj": 4}),
        dict(modules_to_save=["lm_head"]),
        dict(bias="lora_only"),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(layers_to_transform=[0]),
        dict(init_lora_weights="pissa"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's
def test_refuses_what_is_not_plain(checkpoint, causal_lm, tmp_path, options):
    options = dict(r=2, target_modules=["q_proj"]) | options
    make_peft(checkpoint("qwen2"), **options).save_pretrained(tmp_path)
    name = list(options)[-1] if len(options) > 2 else "embed_tokens"
    name = "layers.1.self_attn.q_proj" if "layers" in name else name
    with pytest.raises(ValueError, match=f"has .*{name}.*merge_and_unload"):
        load_adapter(causal_lm, tmp_path)
    assert find_lora(causal_lm.backbone) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(peft_type="LOHA"), "peft_type='LOHA'"),
        (dict(some_new_way=2), "some_new_way=2"),
        (dict(r=None), "r=None and lora_alpha=4.0"),
        (dict(r=3), "factors of the shapes"),
    ],
)
def test_refuses_other_configurations(causal_lm, adapter, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(causal_lm, adapter)


def test_refuses_damaged_folders(causal_lm, adapter):
    arrays = load_file(adapter / WEIGHTS)
    file = adapter / WEIGHTS
    save_file({}, file)
    with pytest.raises(ValueError, match="has no weights"):
        load_adapter(causal_lm, adapter)
    arrays.pop(next(name for name in arrays if "lora_B" in name))
    save_file(arrays, file)
    with pytest.raises(ValueError, match="factors of the shapes"):
        load_adapter(causal_lm, adapter)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="no readable adapter_model"):
        load_adapter(causal_lm, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="peft_type=None"):
        load_adapter(causal_lm, adapter)


def test_nothing_to_save(causal_lm, adapter, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="has 0 of them, and trains 2. other"):
        save_adapter(causal_lm, tmp_path / "new")
    more = load(checkpoint("qwen2"), lora_rank=2)
    more.backbone.layer_norm.scale.trainable = True
    with pytest.raises(ValueError, match="has 8 of them, and trains 1 other"):
        save_adapter(more, tmp_path / "new")
    (adapter / "notes.txt").touch()
    more.backbone.layer_norm.scale.trainable = False
    with pytest.raises(ValueError, match="wasn't written by keras_iris"):
        save_adapter(more, adapter)


def test_configuration_that_peft_writes(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 4)
