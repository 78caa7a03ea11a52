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

import keras_iris
from keras_iris.data import ChatTemplate
from keras_iris.hub import load

# float32 sums in another order; logits are of size 3
TOLERANCE = 1e-5

CHECKPOINTS = {
    "mistral, no window": dict(
        architecture="mistral", sliding_window=None, head_dim=None
    ),
    "qwen2, untied": dict(architecture="qwen2", tie_word_embeddings=False),
    "llama, untied": dict(architecture="llama", tie_word_embeddings=False),
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


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("is_added", [False, True])
def test_the_routers_loss_of_a_checkpoint(checkpoint, architecture, is_added):
    """It is transformers', of one layer, if config.json asks for it."""
    folder = checkpoint(
        architecture,
        num_hidden_layers=1,
        router_aux_loss_coef=2.0,
        output_router_logits=is_added,
    )
    causal_lm = load(folder, dtype="float32")
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        keras.optimizers.SGD(0.1), keras_iris.losses.SFT(), micro_batch_size=3
    )
    token_ids = random_ids((8, 1, 12))
    mask = np.ones((8, 2, 12), "bool")
    pairs = {
        "token_ids": token_ids.repeat(2, axis=1),
        "padding_mask": mask,
        "response_mask": mask & (np.arange(12) > 3),
    }
    expected = -model.predict(pairs, verbose=0)[:, 0].mean()
    reference, ids = (
        expected_model(folder),
        torch.tensor(token_ids[:, 0]).long(),
    )
    with torch.no_grad():
        whole = reference(ids, labels=ids).loss
        rest = reference(ids, labels=ids, output_router_logits=False).loss
    assert (whole > rest) == is_added
    loss = model.train_on_batch(pairs, np.zeros((8, 2), "float32"))
    assert float(loss) == pytest.approx(
        expected + float(whole - rest), rel=1e-5
    )
