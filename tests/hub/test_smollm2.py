"""The real SmolLM2-135M-Instruct, from the folder in KERAS_IRIS_SMOLLM2."""

import os

import keras
import numpy as np
import pytest
import torch
from reference import (
    expected_logits,
    expected_model,
    expected_tokenizer,
    logits_of,
)
from tokenizer_texts import TEXTS

from keras_iris.data import encode_prompt
from keras_iris.hub import export, load

TOLERANCE = 1e-3  # 30 layers in float32; logits are of size 30
NUM_NEW_TOKENS = 64
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
FOLDER = os.environ.get("KERAS_IRIS_SMOLLM2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER,
        reason="set KERAS_IRIS_SMOLLM2 to a folder of SmolLM2-135M-Instruct",
    ),
]


@pytest.fixture(scope="module")
def causal_lm():
    return load(FOLDER, dtype="float32")


@pytest.fixture(scope="module")
def prompt(causal_lm):
    token_ids = encode_prompt(
        MESSAGES, causal_lm.tokenizer, causal_lm.chat_template
    )
    return np.array([token_ids], "int32")


def test_token_ids(causal_lm):
    expected = expected_tokenizer(FOLDER)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids, text
    assert causal_lm.tokenizer.end_token_ids[0] == 2


def test_prompt(prompt):
    expected = expected_tokenizer(FOLDER).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert prompt[0].tolist() == expected


def test_logits(causal_lm, prompt):
    np.testing.assert_allclose(
        logits_of(causal_lm, prompt),
        expected_logits(FOLDER, prompt),
        rtol=0,
        atol=TOLERANCE,
    )


def test_greedy_continuation(causal_lm, prompt):
    causal_lm.compile(sampler="greedy")
    padding = ((0, 0), (0, NUM_NEW_TOKENS))
    outputs = causal_lm.generate(
        {
            "token_ids": np.pad(prompt, padding),
            "padding_mask": np.pad(np.ones_like(prompt), padding),
        },
        stop_token_ids=None,
    )
    model = expected_model(FOLDER)
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt.astype("int64"))
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
    ).numpy()
    received = keras.ops.convert_to_numpy(outputs["token_ids"])
    np.testing.assert_array_equal(received, expected)


def test_export(causal_lm, prompt, tmp_path):
    folder = export(causal_lm, tmp_path / "model", dtype="float32")
    np.testing.assert_array_equal(
        expected_logits(folder, prompt), expected_logits(FOLDER, prompt)
    )
    again = load(folder, dtype="float32")
    np.testing.assert_array_equal(
        logits_of(again, prompt), logits_of(causal_lm, prompt)
    )
