"""The real SmolLM2-135M-Instruct, which `make_smollm2.py` makes."""

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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(smollm2):
    return smollm2[0]


@pytest.fixture(scope="module")
def causal_lm(folder):
    return load(folder, dtype="float32")


@pytest.fixture(scope="module")
def prompt(causal_lm):
    token_ids = encode_prompt(
        MESSAGES, causal_lm.tokenizer, causal_lm.chat_template
    )
    return np.array([token_ids], "int32")


def test_token_ids(causal_lm, folder):
    expected = expected_tokenizer(folder)
    for text in TEXTS:
        ids = expected(text, add_special_tokens=False).input_ids
        assert causal_lm.tokenizer.encode(text) == ids, text
    assert causal_lm.tokenizer.end_token_ids[0] == 2


def test_prompt(prompt, folder):
    expected = expected_tokenizer(folder).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )
    assert prompt[0].tolist() == expected


def test_logits(causal_lm, prompt, folder):
    np.testing.assert_allclose(
        logits_of(causal_lm, prompt),
        expected_logits(folder, prompt),
        rtol=0,
        atol=TOLERANCE,
    )


def test_greedy_continuation(causal_lm, prompt, folder):
    causal_lm.compile(sampler="greedy")
    padding = ((0, 0), (0, NUM_NEW_TOKENS))
    outputs = causal_lm.generate(
        {
            "token_ids": np.pad(prompt, padding),
            "padding_mask": np.pad(np.ones_like(prompt), padding),
        },
        stop_token_ids=None,
    )
    model = expected_model(folder)
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


def test_export(causal_lm, prompt, folder, tmp_path):
    exported = export(causal_lm, tmp_path / "model", dtype="float32")
    np.testing.assert_array_equal(
        expected_logits(exported, prompt), expected_logits(folder, prompt)
    )
    again = load(exported, dtype="float32")
    np.testing.assert_array_equal(
        logits_of(again, prompt), logits_of(causal_lm, prompt)
    )
