"""Parity with transformers for the same folder."""

import keras
import numpy as np
import pytest
import torch
from reference import (
    expected_logits,
    expected_model,
    expected_tokenizer,
    logits_of,
    random_ids,
)
from tokenizer_texts import TEXTS

from keras_iris.data import ChatTemplate
from keras_iris.hub import load

# float32 sums in another order; logits are of size 3
TOLERANCE = 1e-5
NUM_NEW_TOKENS = 64

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CHECKPOINTS = {
    "mistral": dict(architecture="mistral"),
    "mistral, no window": dict(
        architecture="mistral", sliding_window=None, head_dim=None
    ),
    "qwen2, tied": dict(architecture="qwen2"),
    "qwen2, untied": dict(architecture="qwen2", tie_word_embeddings=False),
    "llama, tied": dict(architecture="llama"),
    "llama, untied": dict(architecture="llama", tie_word_embeddings=False),
    "gemma": dict(architecture="gemma"),
    "gemma, one key head": dict(architecture="gemma", num_key_value_heads=1),
    "qwen2, bfloat16": dict(architecture="qwen2", dtype="bfloat16"),
}
ARCHITECTURES = ("mistral", "qwen2", "llama", "gemma")
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@every_checkpoint
def test_logits(checkpoint, name):
    folder = checkpoint(**CHECKPOINTS[name])
    token_ids = random_ids()
    causal_lm = load(folder, dtype="float32")
    expected = expected_logits(folder, token_ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        logits_of(causal_lm, token_ids), expected, rtol=0, atol=TOLERANCE
    )


def test_llama3_rotary_scaling(checkpoint_with_scaling):
    token_ids = random_ids()
    causal_lm = load(checkpoint_with_scaling, dtype="float32")
    expected = expected_logits(checkpoint_with_scaling, token_ids)
    np.testing.assert_allclose(
        logits_of(causal_lm, token_ids), expected, rtol=0, atol=TOLERANCE
    )


@pytest.fixture
def checkpoint_with_scaling(tmp_path):
    from tiny_checkpoints import save_checkpoint

    return save_checkpoint(tmp_path, "llama", rope_parameters=LLAMA3_SCALING)


@every_architecture
def test_token_ids(checkpoint, architecture):
    folder = checkpoint(architecture)
    tokenizer = load(folder).tokenizer
    expected = expected_tokenizer(folder)
    assert len(TEXTS) >= 200
    texts = [*TEXTS, *tokenizer.special_tokens]
    texts += [f"a{token} b {token}" for token in tokenizer.special_tokens]
    for text in texts:
        ids = expected(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids, text
        decoded = expected.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == decoded, text


@every_architecture
def test_special_tokens_can_be_text(checkpoint, architecture):
    tokenizer = load(checkpoint(architecture)).tokenizer
    special = {tokenizer.encode(t)[-1] for t in tokenizer.special_tokens}
    for token in tokenizer.special_tokens:
        for text in (token, f"a{token}b {token}"):
            ids = tokenizer.encode(text, parse_special=False)
            assert special.isdisjoint(ids), text
            assert token in tokenizer.decode(ids)
    for text in ("plain words", "tabs\t and\n\n newlines"):
        ids = tokenizer.encode(text)
        assert tokenizer.encode(text, parse_special=False) == ids


@every_architecture
def test_chat_template(checkpoint, architecture):
    folder = checkpoint(architecture)
    causal_lm = load(folder)
    messages = [{"role": "user", "content": "Hello,\n  world"}]
    expected = expected_tokenizer(folder)
    prompt = expected.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(causal_lm.chat_template, ChatTemplate)
    assert causal_lm.chat_template.render_prompt(messages) == prompt
    causal_lm.chat_template.check()


END_TOKENS = {
    "mistral": ["</s>"],
    "qwen2": ["<|im_end|>", "<|endoftext|>"],
    "llama": ["<|eot_id|>", "<|end_of_text|>"],
    "gemma": ["<end_of_turn>", "<eos>"],
}


@every_architecture
def test_end_tokens(checkpoint, architecture):
    tokenizer = load(checkpoint(architecture)).tokenizer
    ids = [tokenizer.encode(token)[-1] for token in END_TOKENS[architecture]]
    assert tokenizer.end_token_ids == tuple(ids)


@every_architecture
def test_greedy_continuation(checkpoint, architecture):
    folder = checkpoint(architecture)
    prompt = random_ids((2, 12), seed=1)
    causal_lm = load(folder, dtype="float32")
    causal_lm.compile(sampler="greedy")
    length = prompt.shape[1] + NUM_NEW_TOKENS
    padding = ((0, 0), (0, NUM_NEW_TOKENS))
    outputs = causal_lm.generate(
        {
            "token_ids": np.pad(prompt, padding),
            "padding_mask": np.pad(np.ones_like(prompt), padding),
        },
        max_length=length,
        stop_token_ids=None,
    )
    model = expected_model(folder)
    model.generation_config.eos_token_id = None
    expected = model.generate(
        torch.tensor(prompt.astype("int64")),
        attention_mask=torch.ones(prompt.shape, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        pad_token_id=0,
    ).numpy()
    assert expected.shape == (2, length)
    np.testing.assert_array_equal(
        keras.ops.convert_to_numpy(outputs["token_ids"]), expected
    )
