"""The engine and its worker, with a stand-in for the `vllm` package."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from keras_iris.generation import VLLMEngine, vllm_engine

END = 2
HANG, NO_NUMBER = 1001, 1002  # seeds
# What the worker uses of vLLM. Answers the seed, then the end token. The option
# `code` is run when it starts.
FAKE_VLLM = """
import atexit, os, sys, time
from types import SimpleNamespace as Any

class SamplingParams(Any):
    pass

class LLM:
    def __init__(self, model, **options):
        print("noise on stdout")
        if options.get("tensor_parallel_size") == 99:
            raise RuntimeError("not so many devices")
        exec(options.get("code", ""))
        assert options["skip_tokenizer_init"]

    def generate(self, prompts, sampling, use_tqdm):
        return [self.answer(p["prompt_token_ids"], s)
                for p, s in zip(prompts, sampling, strict=True)]

    def answer(self, prompt, sampling):
        if sampling.seed == 1001:
            print("busy", file=sys.stderr)
            time.sleep(60)
        log_prob = float("nan") if sampling.seed == 1002 else -0.5
        assert (sampling.temperature, sampling.top_k) == (1.0, -1)
        ids = [sampling.seed, len(prompt), *sampling.stop_token_ids]
        ids = ids[: sampling.max_tokens]
        return Any(outputs=[Any(
            token_ids=ids,
            logprobs=[{i: Any(logprob=log_prob)} for i in ids],
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

    threads = threading.active_count()
    yield make
    for engine in engines:
        engine.close()
    assert threading.active_count() == threads


@pytest.fixture
def be_worker(tmp_path, monkeypatch):
    """Runs other code in place of the worker's."""

    def be(code):
        (tmp_path / "worker.py").write_text("import sys, time\n" + code)
        monkeypatch.setattr(vllm_engine, "_WORKER", tmp_path / "worker.py")

    return be


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
    engine = make_engine(
        vllm_options={"tensor_parallel_size": 1},
        environment={"CUDA_VISIBLE_DEVICES": "1"},
        timeout_seconds=60.0,
    )
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
            {"vllm_options": {"code": "raise SystemExit(7)"}},
            RuntimeError,
            "ended with exit status 7",
        ),
        (
            # What the end of the worker leaves: one that was forked.
            {
                "vllm_options": {
                    "code": "time.sleep(60 * (os.fork() == 0)); os._exit(7)"
                }
            },
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vllm_options": {"data_parallel_size": 2}},
            "received 2.*vllm serve --data-parallel-size 2.*ServerEngine",
        ),
        ({"environment": {"CUDA_VISIBLE_DEVICES": 1}}, "DEVICES=1. Put"),
        ({"max_new_tokens": 0}, "`max_new_tokens` has to be an integer"),
        ({"timeout_seconds": 0}, "`timeout_seconds` has to be a positive"),
    ],
)
def test_arguments_that_do_not_fit(make_engine, options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**options)


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (None, "0"),
        ({"OTHER": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "3"),
    ],
)
def test_its_environment(make_engine, monkeypatch, environment, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code = "raise RuntimeError('devices ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    engine = make_engine(environment=environment, vllm_options={"code": code})
    with pytest.raises(RuntimeError, match=f"devices {devices}"):
        engine.generate([[5]], seed=0)


@pytest.mark.parametrize(
    "answer", ["garbage\n", '{"rea', "[1]\n", "{}\n", "\xff\n"]
)
@pytest.mark.parametrize("end", ["time.sleep(60)", ""])
def test_answers_out_of_protocol(make_engine, be_worker, answer, end):
    if answer == '{"rea' and end:
        end = "import os; os.close(1); time.sleep(60)"
    be_worker(
        "print('the reason', file=sys.stderr)\n"
        f"print({answer!r}, end='', flush=True)\n{end}"
    )
    engine = make_engine()
    with pytest.raises(RuntimeError, match="expected one line of JSON") as info:
        engine.generate([[5]], seed=0)
    assert "the reason" in info.value.__notes__[0]
    assert engine.close() is None  # nothing is left to be closed


# More than the pipe holds can't be sent to one that doesn't read.
@pytest.mark.parametrize("size", [1, 2**20])
def test_a_worker_that_does_not_answer(make_engine, be_worker, size):
    be_worker("time.sleep(60)")
    engine = make_engine(timeout_seconds=0.2, vllm_options={"code": "#" * size})
    with pytest.raises(TimeoutError, match="longer than 0.2 seconds"):
        engine.generate([[5]], seed=0)


def test_a_worker_that_does_not_end(make_engine, monkeypatch):
    monkeypatch.setattr(vllm_engine, "_CLOSE_SECONDS", 0.1)
    code = "atexit.register(time.sleep, 60)"
    engine = make_engine(vllm_options={"code": code})
    engine.generate([[5]], seed=0)
    assert engine.close() == -signal.SIGKILL


def test_what_it_prints_is_seen(make_engine, capsys):
    engine = make_engine()
    engine.generate([[5]], seed=0)
    assert engine.close() == 0
    assert "noise on stdout" in capsys.readouterr().err


def test_an_interrupt_leaves_no_answer_behind(make_engine):
    engine = make_engine()
    engine.generate([[5]], seed=0)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    # The processes of pytest-xdist ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt.start()
            engine.generate([[5]], seed=HANG)
    finally:
        signal.signal(signal.SIGINT, before)
    interrupt.join()
    (completion,) = engine.generate([[5]], seed=10)
    assert completion.token_ids == (10, 1, END)


def test_a_token_without_a_log_prob(make_engine):
    with pytest.raises(ValueError, match="Token 0 .* log-prob nan"):
        make_engine().generate([[5]], seed=NO_NUMBER)


# Starts the worker like the engine does, but doesn't wait for its answer.
PARENT = """
import subprocess, sys, time
worker = subprocess.Popen(
    [sys.executable, sys.argv[1]], stdin=subprocess.PIPE, start_new_session=True
)
worker.stdin.write(sys.argv[2].encode())
worker.stdin.flush()
time.sleep(60)
"""


@pytest.mark.usefixtures("make_engine")
def test_the_worker_ends_with_its_parent_while_it_is_busy():
    messages = (
        {"folder": "", "options": {}},
        {
            "prompts": [[5]],
            "seeds": [HANG],
            "end_token_ids": [END],
            "max_new_tokens": 3,
        },
    )
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    worker = Path(vllm_engine.__file__).with_name("vllm_worker.py")
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(worker), lines],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert "busy\n" in parent.stderr  # reads up to it
        parent.kill()
        parent.communicate(timeout=20)  # until the worker's stderr ends, too
