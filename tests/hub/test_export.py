"""Export round trips, also through transformers."""

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import keras
import numpy as np
import pytest
from reference import (
    expected_logits,
    expected_model,
    expected_tokenizer,
    logits_of,
    random_ids,
)
from safetensors.numpy import load_file
from tiny_checkpoints import copy, edit
from tokenizer_texts import TEXTS

from keras_iris import SelfPlay, SelfPlayModel, files, losses
from keras_iris.data import ChatTemplate, Tokenizer, tokenize
from keras_iris.hub import export, load, shards

TOLERANCE = 1e-4
# one rounding of each weight to 8 bits of mantissa
BFLOAT16_TOLERANCE = 0.1
ARCHITECTURES = ("mistral", "qwen2", "llama", "gemma")
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def randomize_adapters(causal_lm, seed=0):
    rng = np.random.default_rng(seed)
    for variable in causal_lm.trainable_variables:
        variable.assign(rng.normal(0, 0.05, variable.shape))


@every_architecture
def test_round_trip_merges_adapters(checkpoint, tmp_path, architecture):
    source = checkpoint(architecture)
    causal_lm = load(source, dtype="float32", lora_rank=2, lora_targets="all")
    token_ids = random_ids()
    before = logits_of(causal_lm, token_ids)
    randomize_adapters(causal_lm)
    logits = logits_of(causal_lm, token_ids)
    assert np.abs(logits - before).max() > 100 * TOLERANCE

    folder = export(causal_lm, tmp_path / "new" / "model", dtype="float32")
    assert [file.name for file in folder.parent.iterdir()] == ["model"]
    again = load(folder, dtype="float32")
    for other in (
        logits_of(again, token_ids),
        expected_logits(folder, token_ids),
    ):
        np.testing.assert_allclose(other, logits, rtol=0, atol=TOLERANCE)
    _assert_same_text_side(causal_lm, again)
    expected = expected_tokenizer(folder)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids
    config = json.loads((folder / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert config["architectures"] == original["architectures"]


def test_text_side_without_source(checkpoint, tmp_path):
    causal_lm = load(checkpoint("mistral"), dtype="float32")
    causal_lm.source = None
    folder = export(causal_lm, tmp_path / "model", dtype="float32")
    _assert_same_text_side(causal_lm, load(folder, dtype="float32"))
    expected = expected_tokenizer(folder)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids


def _assert_same_text_side(first, second):
    tokenizer = second.tokenizer
    assert tokenizer.end_token_ids == first.tokenizer.end_token_ids
    assert tokenizer.pad_token_id == first.tokenizer.pad_token_id
    assert tokenizer.special_tokens == first.tokenizer.special_tokens
    messages = [{"role": "user", "content": "Hello"}]
    prompt = first.chat_template.render_prompt(messages)
    assert second.chat_template.render_prompt(messages) == prompt


@pytest.mark.parametrize(
    ("architecture", "name", "end"),
    [
        ("mistral", "spin", None),  # which writes the start token then
        ("qwen2", "spin", "<|stop|>"),
        ("qwen2", "chatml", None),
    ],
)
def test_what_is_trained_with_is_exported(
    checkpoint, tmp_path, architecture, name, end
):
    """Template, tokenizer, end tokens; transformers and vLLM read them."""
    source = copy(checkpoint(architecture), tmp_path)
    edit(source / "tokenizer_config.json", chat_template=None)
    template = ChatTemplate.named(name)
    options = {"template": template}
    if end:
        definition = json.loads((source / "tokenizer.json").read_text())
        token = {**definition["added_tokens"][0], "id": 635, "content": end}
        definition["added_tokens"].append(token)
        options["tokenizer"] = Tokenizer(
            json.dumps(definition), end_token_ids=[635]
        )
    causal_lm = load(source, default_template=template)
    model = SelfPlayModel(causal_lm)
    model.compile("adam", losses.IRIS())
    rows = [{"prompt": "Hello,  you", "response": "Fine.\n"}]
    run_dir = tmp_path / "run"
    self_play = SelfPlay(model, rows, run_dir, batch_size=1, **options)
    folder = export(causal_lm, tmp_path / "model")

    theirs = expected_tokenizer(folder)
    (example,) = self_play.examples
    turns = [
        {"role": "user", "content": "Hello,  you"},
        {"role": "assistant", "content": "Fine.\n"},
    ]
    ids = theirs.apply_chat_template(turns, return_dict=False)
    trained = [*example.prompt_ids, *example.response_ids]
    assert ids[: len(trained)] == trained
    prompt_ids = theirs.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids == example.prompt_ids.tolist()
    end_id = int(example.response_ids[-1])
    assert theirs.eos_token_id == end_id
    assert end in (None, theirs.eos_token)
    for file in ("config.json", "generation_config.json"):
        ends = json.loads((folder / file).read_text())["eos_token_id"]
        assert np.ravel(ends)[0] == end_id
    again = load(folder)
    _assert_same_text_side(causal_lm, again)
    assert again.tokenizer.fingerprint() == causal_lm.tokenizer.fingerprint()
    (again,) = tokenize(
        rows,
        again.tokenizer,
        template=again.chat_template,
        max_prompt_length=99,
        max_response_length=99,
    )
    assert [*again.prompt_ids, *again.response_ids] == trained


def test_bfloat16_is_the_default(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"), dtype="float32")
    folder = export(causal_lm, tmp_path / "model")
    token_ids = random_ids()
    logits = expected_logits(folder, token_ids)
    difference = np.abs(logits - logits_of(causal_lm, token_ids)).max()
    assert 0 < difference < BFLOAT16_TOLERANCE
    # what is in bfloat16 stays as it is
    twice = export(load(folder, dtype="bfloat16"), tmp_path / "twice")
    once, twice = (load_file(f / "model.safetensors") for f in (folder, twice))
    assert once.keys() == twice.keys()
    for name, array in once.items():
        assert array.tobytes() == twice[name].tobytes()


def test_shards(checkpoint, tmp_path, monkeypatch):
    causal_lm = load(checkpoint("mistral"), dtype="float32")
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    folder = export(causal_lm, tmp_path / "model", dtype="float32")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    again = load(folder, dtype="float32")
    token_ids = random_ids()
    logits = logits_of(causal_lm, token_ids)
    np.testing.assert_array_equal(logits_of(again, token_ids), logits)
    np.testing.assert_allclose(
        expected_logits(folder, token_ids), logits, rtol=0, atol=TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma"])
def test_quantized(checkpoint, tmp_path, architecture, mode):
    causal_lm = load(
        checkpoint(architecture),
        dtype="float32",
        lora_rank=2,
        lora_targets="all",
        quantize=mode,
    )
    randomize_adapters(causal_lm)
    folder = export(causal_lm, tmp_path / "model", dtype="float32")
    token_ids = random_ids()
    logits = logits_of(causal_lm, token_ids)
    # int8 also rounds activations; int4 doesn't
    tolerance = 0.3 if mode == "int8" else TOLERANCE
    np.testing.assert_allclose(
        expected_logits(folder, token_ids), logits, rtol=0, atol=tolerance
    )


def test_replaces_an_earlier_export_only(checkpoint, tmp_path, monkeypatch):
    causal_lm = load(checkpoint("qwen2"))
    folder = tmp_path / "model"
    folder.mkdir()
    export(causal_lm, folder)
    with monkeypatch.context() as changed:
        changed.setattr(shards, "SHARD_BYTES", 100_000)
        export(causal_lm, folder)
    assert not (folder / "model.safetensors").exists()
    export(causal_lm, folder)
    assert (folder / "model.safetensors").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]

    other = tmp_path / "other"
    shutil.copytree(checkpoint("qwen2"), other)
    with pytest.raises(ValueError, match="wasn't written by keras_iris"):
        export(causal_lm, other)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="wasn't written by keras_iris"):
        export(causal_lm, file)


@pytest.mark.parametrize("name", ["README.md", "model.gguf", "vocab.json"])
def test_keeps_what_a_user_added(checkpoint, tmp_path, name):
    causal_lm = load(checkpoint("qwen2"))
    folder = export(causal_lm, tmp_path / "model")
    (folder / name).write_text("mine")
    with pytest.raises(ValueError, match=f"not all of it: {name}. It isn't"):
        export(causal_lm, folder)
    assert (folder / name).read_text() == "mine"


def test_keeps_what_other_tools_made_of_an_export(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"))
    folder = export(causal_lm, tmp_path / "model")
    tuned = expected_model(folder)
    shutil.copytree(folder, tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "tuned")
    before = (tmp_path / "tuned" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="wasn't written by keras_iris"):
        export(causal_lm, tmp_path / "tuned")
    after = (tmp_path / "tuned" / "model.safetensors").read_bytes()
    assert after == before


# Without the package, whose import takes seconds.
KILLED = """
import importlib.util, os, pathlib, signal, sys

spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
rename = pathlib.Path.rename
number = int(sys.argv[3])

def rename_or_die(path, target):
    global number
    if not number:
        os.kill(os.getpid(), signal.SIGKILL)
    number -= 1
    return rename(path, target)

pathlib.Path.rename = rename_or_die
with files.written_beside(pathlib.Path(sys.argv[2])) as new:
    (new / "new").touch()
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_export(tmp_path, renames):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").touch()
    arguments = [files.__file__, folder, renames]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], check=False
    )
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # the leftovers among them
    with pytest.raises(KeyboardInterrupt), files.written_beside(folder):
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert [file.name for file in folder.iterdir()] == ["old"]


def test_killed_before_the_old_folder_was_removed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    old = tmp_path / ".model.keras_iris-old"
    old.mkdir()
    (old / "old").touch()
    with files.written_beside(folder) as new:
        (new / "new").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert [file.name for file in folder.iterdir()] == ["new"]


def test_full_disk_is_seen_before_writing(checkpoint, tmp_path, monkeypatch):
    causal_lm = load(checkpoint("qwen2"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 0))
    with pytest.raises(OSError, match=r"0\.0 GiB left, expected 0\.1 GiB"):
        export(causal_lm, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("step", ["save_file", "rename", "fsync"])
def test_error_leaves_nothing(checkpoint, tmp_path, monkeypatch, earlier, step):
    causal_lm = load(checkpoint("qwen2"))
    folder = tmp_path / "model"
    if earlier:
        export(causal_lm, folder)
    before = {f.name: f.read_bytes() for f in folder.glob("*")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def rename(path, target):
        if target == folder and path.name.startswith(".model"):
            monkeypatch.undo()  # putting the old one back works
            full()
        return type(path)(path.replace(target))

    match step:
        case "save_file":
            monkeypatch.setattr(shards, "save_file", full)
        case "rename":
            monkeypatch.setattr(type(folder), "rename", rename)
        case "fsync":
            monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export(causal_lm, folder)
    assert {f.name: f.read_bytes() for f in folder.glob("*")} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"] * earlier


def test_refuses_weights_that_are_not_finite(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"))
    scale = causal_lm.backbone.layer_norm.scale
    scale.assign(np.full(scale.shape, np.nan))
    with pytest.raises(ValueError, match="model.norm.weight' isn't finite"):
        export(causal_lm, tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_refuses_bad_arguments(checkpoint, tmp_path):
    causal_lm = load(checkpoint("qwen2"))
    target = tmp_path / "model"
    with pytest.raises(ValueError, match="`dtype` has to be one of"):
        export(causal_lm, target, dtype="int8")
    with pytest.raises(ValueError, match="another model's folder"):
        export(causal_lm, target, source=checkpoint("mistral"))
    with pytest.raises(ValueError, match="no such config.json"):
        export(causal_lm, target, source=tmp_path)
    assert not any(tmp_path.iterdir())


def test_refuses_other_architectures(tmp_path):
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
    )
    causal_lm = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    with pytest.raises(ValueError, match="Cannot write a GPT2Backbone"):
        export(causal_lm, tmp_path / "model")


def test_model_without_tokenizer(tmp_path):
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=700,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=24,
    )
    causal_lm = keras_hub.models.QwenCausalLM(backbone, preprocessor=None)
    with pytest.warns(UserWarning, match="say how long a sequence may be"):
        folder = export(causal_lm, tmp_path / "model", dtype="float32")
    token_ids = random_ids()
    np.testing.assert_allclose(
        expected_logits(folder, token_ids),
        logits_of(causal_lm, token_ids),
        rtol=0,
        atol=TOLERANCE,
    )
