"""Against a tiny server on 127.0.0.1 that answers what a test tells it to."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from keras_iris.generation import ServerEngine
from keras_iris.generation.server_response import read_completion

pytest.importorskip("openai")

END = 2


def as_json(finish_reason="stop", **choice):
    choice = {"index": 0, "text": "", "finish_reason": finish_reason, **choice}
    return json.dumps({"object": "text_completion", "choices": [choice]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(length))
        self.server.requests.append(request)
        self.server.answer(self, request)

    def send(self, body, status=200, claimed_length=None, headers=()):
        body = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(claimed_length or len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def make_engine(server, **options):
    defaults = dict(
        model="tiny", end_token_ids=(END,), max_new_tokens=4, max_retries=0
    )
    host, port = server.server_address
    return ServerEngine(f"http://{host}:{port}/v1", **{**defaults, **options})


def echo_first_id(handler, request):
    """Answers with the prompt's first id; later requests come back first."""
    first = request["prompt"][0]
    time.sleep(0.02 * (10 - first))
    handler.send(
        as_json(
            token_ids=[first, END],
            logprobs={"token_logprobs": [-0.5, -0.25]},
        )
    )


def test_ids_seeds_and_order(server):
    server.answer = echo_first_id
    engine = make_engine(server, concurrency=3)
    completions = engine.generate([[5, 1], [6], [7], [8]], seed=40)
    assert [c.token_ids for c in completions] == [
        (first, END) for first in (5, 6, 7, 8)
    ]
    assert completions[0].finish_reason == "stop"
    np.testing.assert_array_equal(completions[0].log_probs, [-0.5, -0.25])
    seeds = {tuple(r["prompt"]): r["seed"] for r in server.requests}
    assert seeds == {(5, 1): 40, (6,): 41, (7,): 42, (8,): 43}


def test_a_prompt_that_is_there_several_times_has_several_seeds(server):
    server.answer = lambda handler, request: handler.send(
        as_json(token_ids=[request["seed"], END])
    )
    completions = make_engine(server).generate([[9]] * 3, seed=40)
    assert [c.token_ids[0] for c in completions] == [40, 41, 42]


def test_requests_ask_for_the_whole_distribution(server):
    server.answer = echo_first_id
    make_engine(server).generate([[9]], seed=0)
    (request,) = server.requests
    assert request["temperature"] == request["top_p"] == 1.0
    assert request["top_k"] == -1
    assert request["min_p"] == 0.0
    assert request["repetition_penalty"] == request["repeat_penalty"] == 1.0
    assert request["max_tokens"] == 4
    assert request["stop_token_ids"] == [END]


def test_the_configuration_is_what_decides_the_completions(server):
    first = make_engine(server).get_config()
    second = ServerEngine(
        "http://127.0.0.1:1/v1",
        model="other name",
        end_token_ids=(END,),
        max_new_tokens=4,
        concurrency=2,
        timeout_seconds=1.0,
    ).get_config()
    assert first == second == {"end_token_ids": (END,), "max_new_tokens": 4}


@pytest.mark.filterwarnings("error")
def test_a_busy_server_is_asked_again(server):
    def answer(handler, request):
        if len(server.requests) == 1:
            handler.send('{"error": "busy"}', status=503)
        else:
            echo_first_id(handler, request)

    server.answer = answer
    (completion,) = make_engine(server, max_retries=1).generate([[9]], seed=3)
    assert completion.token_ids == (9, END)
    assert [request["seed"] for request in server.requests] == [3, 3]


def send(body, **options):
    return lambda handler, request: handler.send(body, **options)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (
            lambda handler, request: time.sleep(0.5),
            TimeoutError,
            "longer than 0.2 seconds.*`timeout_seconds`",
        ),
        (
            send(as_json(token_ids=[END]), claimed_length=10_000),
            ConnectionError,
            "broke off",
        ),
        (send("<html>"), ValueError, "can't be read.*received '<html>'"),
        (send('{"choices": []}'), ValueError, "can't be read.*expected 1"),
        (send("[1]"), ValueError, "can't be read.*TypeError"),
        (send(as_json()), ValueError, "can't be read.*gives token ids"),
        (
            send(as_json("length", token_ids=[5])),
            ValueError,
            "answered 1 tokens with finish_reason='length'.*or 4 tokens",
        ),
        (
            send('{"error": {"message": "no such model"}}', status=404),
            ValueError,
            "HTTP status 404.*Check `model`",
        ),
        (
            send('{"error": {"message": "out of memory"}}', status=500),
            ConnectionError,
            "failing or busy.*HTTP status 500.*out of memory.*run again",
        ),
        (
            send("{}", status=429, headers=[("Retry-After", "3000")]),
            ConnectionError,
            "failing or busy.*HTTP status 429, Retry-After: 3000",
        ),
    ],
)
def test_one_clear_error(server, answer, error, message):
    server.answer = answer
    with pytest.raises(error, match=message):
        make_engine(server, timeout_seconds=0.2).generate([[9]] * 3, seed=0)


def test_a_server_that_is_down(server):
    engine = make_engine(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="can't be reached.*base_url"):
        engine.generate([[9]], seed=0)


def test_a_pause_that_is_too_long_is_not_made(server):
    server.answer = send("{}", status=429, headers=[("Retry-After", "3000")])
    with pytest.raises(ConnectionError):
        make_engine(server, max_retries=3).generate([[9]], seed=0)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("concurrency", 0),
        ("timeout_seconds", 0),
        ("max_retries", -1),
    ],
)
def test_limits_that_are_none(server, name, value):
    with pytest.raises(ValueError, match=f"`{name}` has to be"):
        make_engine(server, **{name: value})


def test_an_empty_prompt_is_not_sent(server):
    with pytest.raises(ValueError, match="1 of 2 prompts are empty"):
        make_engine(server).generate([[9], []], seed=0)
    assert server.requests == []


def test_update(server, tmp_path):
    folders = []
    make_engine(server, on_update=folders.append).update(tmp_path)
    assert folders == [tmp_path]
    with pytest.raises(ValueError, match="still has the old weights"):
        make_engine(server).update(tmp_path)


def test_shards_are_one_queue(server):
    """All twelve are in flight, or none is answered; the last one waits."""
    barrier, first_is_there = threading.Barrier(12), threading.Event()

    def answer(handler, request):
        barrier.wait(10)
        if request["prompt"] == [11]:
            assert first_is_there.wait(10)
        handler.send(as_json(token_ids=[request["seed"], END]))

    server.answer = answer
    shards = [
        (np.array([[4 * number + i] for i in range(4)]), 100 * number)
        for number in range(3)
    ]
    engine = make_engine(server, concurrency=12)
    completions = []
    for shard in engine.generate_shards(shards):
        first_is_there.set()
        completions.append([c.token_ids[0] for c in shard])
    assert completions == [
        [100 * number + i for i in range(4)] for number in range(3)
    ]


def test_what_is_not_wanted_any_more_is_broken_off(server):
    is_over = threading.Event()

    def answer(handler, request):
        if request["prompt"] != [9]:
            is_over.wait(30)
        handler.send(as_json(token_ids=[END]))

    server.answer = answer
    engine = make_engine(server, concurrency=2)
    stream = engine.generate_shards([([[9]], 0), ([[8]] * 100, 0)])
    next(stream)
    stream.close()
    is_over.set()
    assert len(server.requests) < 6


@pytest.mark.parametrize("models", ['{"data": []}', "<html>", "[1]"])
def test_models_that_cannot_be_read(server, monkeypatch, models):
    """A proxy's page, say, in place of OpenAI's list."""
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: self.send(models), raising=False
    )
    engine = make_engine(server, model=None)
    with pytest.raises(ValueError, match="which models it has.*or pass `mod"):
        engine.generate([[9]], seed=0)


# A server elsewhere, reached by plain http: by way of the tests' own as proxy.
ELSEWHERE = "http://models.example/v1"


@pytest.mark.parametrize(
    ("base_url", "options", "key"),
    [
        (None, {}, "Bearer secret"),
        (None, {"api_key": "mine"}, "Bearer mine"),
        (ELSEWHERE, {}, "Bearer none"),
        (ELSEWHERE, {"api_key": "mine"}, "Bearer mine"),
    ],
)
def test_a_key_goes_where_it_is_sent(
    server, monkeypatch, base_url, options, key
):
    keys = []

    def answer(handler, request):
        keys.append(handler.headers["Authorization"])
        assert handler.path.startswith("http:") == (base_url is not None)
        echo_first_id(handler, request)

    server.answer = answer
    host, port = server.server_address
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://{host}:{port}")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    if base_url is None:
        engine = make_engine(server, **options)
    else:
        engine = ServerEngine(
            base_url,
            model="tiny",
            end_token_ids=(END,),
            max_new_tokens=4,
            max_retries=0,
            **options,
        )
    engine.generate([[9]], seed=0)
    assert keys == [key]


@pytest.mark.parametrize(
    ("choice", "token_ids", "log_probs"),
    [
        # vLLM, SGLang
        (
            {
                "token_ids": [7, END],
                "logprobs": {"token_logprobs": [-1, -2], "tokens": ["x", ""]},
            },
            (7, END),
            [-1, -2],
        ),
        # llama.cpp
        (
            {
                "logprobs": {
                    "content": [
                        {"id": 7, "token": "x", "logprob": -1},
                        {"id": END, "token": "", "logprob": -2},
                    ]
                }
            },
            (7, END),
            [-1, -2],
        ),
        # The same from a server that leaves the end token out.
        (
            {"logprobs": {"content": [{"id": 7, "logprob": -1}]}},
            (7, END),
            None,
        ),
        # What follows an end token isn't part of the answer.
        ({"token_ids": [7, END, 9]}, (7, END), None),
    ],
)
def test_where_ids_come_from(choice, token_ids, log_probs):
    completion = read_completion(as_json(**choice), (END,), 4)
    assert completion.token_ids == token_ids
    assert completion.finish_reason == "stop"
    if log_probs is None:
        assert completion.log_probs is None
    else:
        np.testing.assert_array_equal(completion.log_probs, log_probs)


@pytest.mark.parametrize("wrong", [2.7, -1, "7", None, True])
@pytest.mark.parametrize(
    "as_choice",
    [
        lambda wrong: {"token_ids": [wrong, END]},
        lambda wrong: {
            "logprobs": {"content": [{"id": wrong, "logprob": -1.0}]}
        },
    ],
)
def test_what_is_no_token_id(wrong, as_choice):
    with pytest.raises(ValueError, match=f"{wrong!r} isn't a token id"):
        read_completion(as_json(**as_choice(wrong)), (END,), 4)


@pytest.mark.parametrize(
    "wrong", [None, float("nan"), float("-inf"), 0.5, "-0.5"]
)
def test_a_token_whose_log_prob_is_none(wrong):
    text = as_json(
        token_ids=[7, 8, END], logprobs={"token_logprobs": [-1, wrong, -1]}
    )
    with pytest.raises(ValueError, match=f"Token 1 .* log-prob {wrong!r}"):
        read_completion(text, (END,), 4)


def test_log_probs_that_are_not_told_or_not_of_the_answer():
    text = as_json(token_ids=[7, END], logprobs={"token_logprobs": None})
    assert read_completion(text, (END,), 4).log_probs is None
    # 0 by the rounding of log-softmax; and null after the end token.
    values = {"token_logprobs": [1e-6, -1, None]}
    text = as_json(token_ids=[7, END, 9], logprobs=values)
    log_probs = read_completion(text, (END,), 4).log_probs
    np.testing.assert_array_equal(log_probs, np.array([1e-6, -1], "float32"))


def test_which_end_token_was_left_out_is_not_guessed():
    text = as_json(token_ids=[7])
    assert read_completion(text, (END,), 4).token_ids == (7, END)
    with pytest.raises(ValueError, match="there are 2 of them: .* one end"):
        read_completion(text, (END, 3), 4)


def test_an_answer_of_the_full_length():
    text = as_json("length", token_ids=[5, 6, 7, 8])
    completion = read_completion(text, (END,), 4)
    assert completion.finish_reason == "length"
    assert completion.token_ids == (5, 6, 7, 8)


def test_an_answer_that_is_longer_than_asked_for():
    """With the end token that the server left out."""
    text = as_json("stop", token_ids=[5, 6, 7, 8])
    with pytest.raises(ValueError, match="answered 5 tokens .*'stop'"):
        read_completion(text, (END,), 4)


def test_two_choices():
    choice = json.loads(as_json(token_ids=[7, END]))["choices"][0]
    with pytest.raises(ValueError, match="can't be read.*one choice"):
        read_completion(json.dumps({"choices": [choice, choice]}), (END,), 4)


def test_log_probs_of_some_tokens():
    def read(values):
        logprobs = {"token_logprobs": values}
        text = as_json(token_ids=[7, 8, END], logprobs=logprobs)
        return read_completion(text, (END,), 4).log_probs

    assert read([-1.0, -2.0]) is None  # the end token has none
    assert read([]) is None
    for values in ([-1.0], [-1.0] * 4):
        count = len(values)
        with pytest.raises(ValueError, match=f"{count} log-probs of 3 token"):
            read(values)


def test_the_log_prob_of_an_end_token_that_was_left_out():
    logprobs = {"token_logprobs": [-1.0, -2.0]}
    text = as_json(token_ids=[7], logprobs=logprobs)
    completion = read_completion(text, (END,), 4)
    assert completion.token_ids == (7, END)
    assert completion.log_probs.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("ids", [{END}, iter([END]), END, np.array([END])])
def test_end_tokens_in_any_form(server, ids):
    assert make_engine(server, end_token_ids=ids).end_token_ids == (END,)


def test_no_end_token(server):
    with pytest.raises(ValueError, match="one id in `end_token_ids`"):
        make_engine(server, end_token_ids=())
