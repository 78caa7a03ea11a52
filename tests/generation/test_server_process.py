"""A server in a process of its own, which a test tells what to do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from keras_iris.generation import ServerEngine, server_process

pytest.importorskip("openai")

END = 2
# Answers with what is in the folder's config.json, the number of its devices
# and the end token. Its arguments: port, folder, and Python to run before.
SERVER = """
import json, os, pathlib, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
pathlib.Path(os.environ["PIDS"]).open("a").write(f"{os.getpid()}\\n")
print("the server says", folder.name, flush=True)
exec(sys.argv[3])
adapters = {}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send({"data": [{"id": "base"}]})

    def do_POST(self):
        size = int(self.headers["Content-Length"])
        request = json.loads(self.rfile.read(size))
        if self.path.endswith("/load_lora_adapter"):
            file = pathlib.Path(request["lora_path"]) / "adapter_config.json"
            adapters[request["lora_name"]] = json.loads(file.read_text())
        elif self.path.endswith("/unload_lora_adapter"):
            del adapters[request["lora_name"]]
        elif request["prompt"] == [666]:
            os._exit(7)
        else:
            model = request["model"]
            weights = adapters[model] if model in adapters else json.loads(
                (folder / "config.json").read_text()
            )
            ids = [weights, len(adapters), int(os.environ["DEVICES"]), 2]
            choice = {"finish_reason": "stop", "token_ids": ids}
            return self.send({"choices": [choice]})
        self.send({})

    def send(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make_folder(tmp_path):
    def make(weights, name="export", file="config.json"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(weights))
        return folder

    return make


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "serve.py").write_text(SERVER)
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    script = str(tmp_path / "serve.py")
    return [sys.executable, "-S", script, "{port}", "{folder}"]


@pytest.fixture
def make_engine(command):
    engines = []

    def make(code="", command=command, **options):
        defaults = dict(
            command=command and [*command, code],
            environment={"DEVICES": "3"},
            end_token_ids=(END,),
            max_new_tokens=4,
            max_retries=0,
        )
        engines.append(ServerEngine(**{**defaults, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended; who started it has to ask for its status.
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout
    return not state.startswith("Z") and bool(state)


def pids(tmp_path):
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def wait_until_over(tmp_path):
    """Waits for the end of all that was started."""
    end = time.monotonic() + 20
    while any(is_running(pid) for pid in pids(tmp_path)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_server_for_each_export(make_engine, make_folder, tmp_path):
    engine = make_engine()
    with pytest.raises(ValueError, match="no server yet. Give `update`"):
        engine.generate([[5]], seed=0)
    for weights in (17, 18):
        engine.update(make_folder(weights))
        (completion,) = engine.generate([[5]], seed=0)
        assert completion.token_ids == (weights, 0, 3, END)
    first, second = pids(tmp_path)
    assert not is_running(first) and is_running(second)
    engine.close()
    assert not is_running(second)


def test_a_server_for_all_adapters(make_engine, make_folder, command, tmp_path):
    base = str(make_folder(11))
    options = {"command": [*command[:-1], base], "adapters": True}
    engine = make_engine(**options)
    for weights in (17, 18, 19):
        engine.update(make_folder(weights, "adapter", "adapter_config.json"))
        (completion,) = engine.generate([[5]], seed=0)
        assert completion.token_ids == (weights, 1, 3, END)
        assert len(pids(tmp_path)) == 1 + (weights == 19)
        if weights == 18:  # one that has died is started again
            with pytest.raises(ConnectionError):
                engine.generate([[666]], seed=0)
            wait_until_over(tmp_path)


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (
            "sys.exit(7)",
            RuntimeError,
            "ended with exit status 7 .*\n+the server says export",
        ),
        # What the end of the server leaves.
        (
            "os.fork() or time.sleep(60); sys.exit(7)",
            RuntimeError,
            "ended with exit status 7",
        ),
        (
            "time.sleep(60)",
            TimeoutError,
            "wasn't ready after 1 seconds.*`start_seconds`.*last lines",
        ),
    ],
)
def test_a_server_that_does_not_come_up(  # noqa: PLR0913
    make_engine, make_folder, tmp_path, code, error, message
):
    engine = make_engine(code, start_seconds=1 if error is TimeoutError else 60)
    with pytest.raises(error, match=message):
        engine.update(make_folder(17))
    wait_until_over(tmp_path)


def test_a_program_that_is_not_there(make_engine, make_folder):
    engine = make_engine(command=["/no/such/vllm", "{folder}", "{port}"])
    with pytest.raises(RuntimeError, match="status 127.*\n.*No such file"):
        engine.update(make_folder(17))


def test_a_server_that_dies_says_why(make_engine, make_folder):
    engine = make_engine()
    engine.update(make_folder(17))
    with pytest.raises(ConnectionError, match="can't be reached") as info:
        engine.generate([[5], [666]], seed=0)
    assert "the server says export" in info.value.__notes__[0]


def test_one_that_does_not_end_is_killed(
    make_engine, make_folder, tmp_path, monkeypatch
):
    # The guard reads the file anew.
    text = (
        open(server_process.__file__)
        .read()
        .replace("_CLOSE_SECONDS = 30.0", "_CLOSE_SECONDS = 0.1")
    )
    (tmp_path / "guard.py").write_text(text)
    monkeypatch.setattr(server_process, "__file__", str(tmp_path / "guard.py"))
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    engine = make_engine(ignore)
    engine.update(make_folder(17))
    engine.close()
    wait_until_over(tmp_path)


# Runs the module alone, as keras takes seconds to import.
PARENT = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("server_process", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
folder, log = Path(sys.argv[2]), Path(sys.argv[2] + ".log")
module.Server(
    sys.argv[3:], folder, environment={}, log=log, start_seconds=60
)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_server_ends_with_its_parent(
    command, make_folder, tmp_path, number
):
    """Also while the parent waits for it: it has no `/health` yet."""
    folder = str(make_folder(17))
    is_there = tmp_path / "there"
    code = (
        "child = subprocess.Popen(['sleep', '60']);"
        "open(os.environ['PIDS'], 'a').write(f'{child.pid}\\n');"
        f"pathlib.Path({str(is_there)!r}).touch(); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PARENT,
            server_process.__file__,
            folder,
            *command,
            code,
        ],
        stderr=subprocess.DEVNULL,
        # The processes of pytest-xdist ignore the signal.
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),
    )
    while not is_there.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(number)
    parent.wait(20)
    assert len(pids(tmp_path)) == 2
    wait_until_over(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": None}, "Expected either the `base_url`.*None and None"),
        ({"base_url": "http://127.0.0.1:1/v1"}, "either the `base_url`"),
        ({"command": ["vllm", "{folder}"]}, "and {port} with ada"),
        ({"command": ["vllm", "{port}"]}, "{folder} and .*=False"),
        ({"adapters": True}, "adapters=True"),
        ({"start_seconds": 0}, "`start_seconds` has to be"),
    ],
)
def test_arguments_that_do_not_fit(make_engine, options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**options)
