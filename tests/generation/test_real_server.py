"""A real llama.cpp server (`xllamacpp`) with SmolLM2-135M-Instruct."""

import numpy as np
import pytest
from generation_helpers import trainer_log_probs

import keras_iris
from keras_iris.data import encode_prompt
from keras_iris.generation import ServerEngine, check_log_probs

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "What is 7 times 8?",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def causal_lm(smollm2):
    return keras_iris.load(smollm2[0], dtype="float32")


@pytest.fixture(scope="module")
def engine(causal_lm, smollm2):
    import xllamacpp  # which `make test-slow` installs

    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2[1])
    params.hostnames = ["127.0.0.1"]
    params.port = 0  # any that is free
    params.n_ctx = 2048
    params.n_parallel = 2
    params.cpuparams.n_threads = 2
    server = xllamacpp.Server(params)
    # The server ends with its object, so this frame has to last.
    yield ServerEngine(
        f"{server.listening_address}/v1",
        end_token_ids=causal_lm.tokenizer.end_token_ids,
        max_new_tokens=24,
        concurrency=2,
    )


@pytest.fixture(scope="module")
def prompts(causal_lm):
    return [
        encode_prompt(
            [{"role": "user", "content": question}],
            causal_lm.tokenizer,
            causal_lm.chat_template,
        )
        for question in QUESTIONS
    ]


def test_the_server_samples_from_the_trainers_model(engine, causal_lm, prompts):
    completions = engine.generate(prompts, seed=0)
    ends = causal_lm.tokenizer.end_token_ids
    for completion in completions:
        assert (completion.token_ids[-1] in ends) == (
            completion.finish_reason == "stop"
        )
    scores = trainer_log_probs(causal_lm, prompts, completions)
    given = [c.log_probs for c in completions]
    assert any(g is not None for g in given)
    difference = check_log_probs(
        [np.sum(g) for g in given if g is not None],
        [s for s, g in zip(scores, given, strict=True) if g is not None],
        [len(g) for g in given if g is not None],
    )
    print(f"difference: {difference:.4f} nats per token")


def test_seeds_give_different_samples_that_repeat(engine, prompts):
    first, again, other = (
        [c.token_ids for c in engine.generate(prompts[:2], seed=seed)]
        for seed in (1, 1, 7)
    )
    assert first != other
    assert first == again
