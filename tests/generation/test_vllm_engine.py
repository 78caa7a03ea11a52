"""The engine and its worker, with a stand-in for the `vllm` package."""

import sys

import numpy as np
import pytest

from keras_iris.generation import VLLMEngine

END = 2
# What the worker uses of vLLM. Answers the seed, then the end token.
FAKE_VLLM = """
from types import SimpleNamespace as Any

class SamplingParams(Any):
    pass

class LLM:
    def __init__(self, model, **options):
        print("noise on stdout")
        if options.get("tensor_parallel_size") == 99:
            raise RuntimeError("not so many devices")
        if options.get("tensor_parallel_size") == 98:
            raise SystemExit(7)
        assert options["skip_tokenizer_init"]

    def generate(self, prompts, sampling, use_tqdm):
        return [self.answer(p["prompt_token_ids"], s)
                for p, s in zip(prompts, sampling, strict=True)]

    def answer(self, prompt, sampling):
        assert (sampling.temperature, sampling.top_k) == (1.0, -1)
        ids = [sampling.seed, len(prompt), *sampling.stop_token_ids]
        ids = ids[: sampling.max_tokens]
        return Any(outputs=[Any(
            token_ids=ids,
            logprobs=[{i: Any(logprob=-0.5)} for i in ids],
            finish_reason="stop" if len(ids) == 3 else "length",
        )])
"""


@pytest.fixture
def make_engine(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engines = []

    def make(**options):
        defaults = dict(
            folder=tmp_path,
            python=sys.executable,
            end_token_ids=(END,),
            max_new_tokens=3,
        )
        engines.append(VLLMEngine(**{**defaults, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_ids_in_ids_out(make_engine, tmp_path):
    engine = make_engine(vllm_options={"tensor_parallel_size": 1})
    first, second = engine.generate([[5], [6, 7]], seed=10)
    assert first.token_ids == (10, 1, END)
    assert second.token_ids == (11, 2, END)
    assert second.finish_reason == "stop"
    np.testing.assert_array_equal(second.log_probs, [-0.5] * 3)
    engine.update(tmp_path)
    (again,) = engine.generate(np.array([[5]]), seed=10)
    assert again.token_ids == first.token_ids


def test_the_configuration_is_what_decides_the_completions(make_engine):
    engine = make_engine(vllm_options={"tensor_parallel_size": 1})
    assert engine.get_config() == {
        "end_token_ids": (END,),
        "max_new_tokens": 3,
    }


def test_the_limit(make_engine):
    (completion,) = make_engine(max_new_tokens=2).generate([[5]], seed=0)
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"python": "/no/such/python"}, RuntimeError, "can't be started"),
        ({"folder": "/no/such"}, ValueError, "with a config.json"),
        (
            {"vllm_options": {"tensor_parallel_size": 99}},
            RuntimeError,
            "vLLM failed: RuntimeError: not so many devices.*options",
        ),
        (
            {"vllm_options": {"tensor_parallel_size": 98}},
            RuntimeError,
            "ended with exit status 7",
        ),
    ],
)
def test_one_clear_error(make_engine, options, error, message):
    with pytest.raises(error, match=message):
        make_engine(**options).generate([[5]], seed=0)


def test_an_empty_prompt(make_engine):
    with pytest.raises(ValueError, match="1 of 1 prompts are empty"):
        make_engine().generate([[]], seed=0)
