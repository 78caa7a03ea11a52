"""Generation by a server: vLLM, SGLang, llama.cpp or the like."""

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_iris.arguments import check_count, check_positive
from keras_iris.generation.engine import (
    Completion,
    Engine,
    Prompts,
    check_prompts,
    read_end_tokens,
)
from keras_iris.generation.server_client import ServerClient
from keras_iris.generation.server_process import Server
from keras_iris.generation.server_response import read_completion

# Servers' defaults cut the distribution (llama.cpp: top-k 40, min-p 0.05;
# vLLM and SGLang: what generation_config.json says), and self-play needs all
# of it. A server that doesn't know a parameter ignores it.
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,  # vLLM, SGLang
    "repeat_penalty": 1.0,  # llama.cpp
    "logprobs": 0,  # of the sampled token
    "skip_special_tokens": False,
    "return_token_ids": True,  # vLLM, SGLang
    "n_probs": 1,  # llama.cpp, which gives ids with log-probs only
}


class ServerEngine(Engine):
    """Draws completions from an OpenAI-compatible server.

    Either from one that it starts itself for each exported model, on a free
    port and with its own Python environment and devices:

    ```python
    engine = ServerEngine(
        command="/opt/vllm/bin/vllm serve {folder} --port {port}".split(),
        environment={"CUDA_VISIBLE_DEVICES": "1"},
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=256,
    )
    ```

    or from one at `base_url`, whose weights `on_update` exchanges. With
    `adapters=True` either one keeps serving the model that LoRA began with,
    and is given each iteration's adapter by vLLM's `/load_lora_adapter`
    (`--enable-lora --max-lora-rank R`, and where it isn't started here
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True` in its environment).

    Prompts are sent as token ids to `/completions`, one a request, each with
    a seed of its own, at temperature 1 without top-k, top-p, min-p or
    penalties. Connection errors, time-outs, and HTTP 408, 409, 429 and 5xx
    are tried again after growing pauses, or the one that the server asks for
    if that is at most two minutes.

    What a started server prints is in `server.log` beside the folder that it
    was given. It ends with `close`, with the next `update`, or with this
    process, also if that is killed. Needs `pip install keras_iris[server]`.

    Args:
        base_url: Of a server that runs, like `"http://127.0.0.1:8000/v1"`.
        model: The model's name on the server; by default its first.
        command: Of the server to start: the program and its arguments,
            `{port}` and, without `adapters`, `{folder}` among them.
        environment: Variables of that server, on top of this process's. Give
            it devices other than those that train.
        start_seconds: The longest wait for it to be healthy.
        adapters: Whether the server takes adapters instead of whole models.
        on_update: Called with the folder of each exported model; has to make
            the server at `base_url` serve it, and to return when it does. It
            may not write into the folder, which the next export replaces.
        end_token_ids: A completion ends with the first of these, which is
            kept.
        max_new_tokens: A completion ends after so many tokens at the latest.
        concurrency: Requests at a time.
        timeout_seconds: The longest wait for a server that sends nothing.
        max_retries: Further tries of each request.
        api_key: The server's. By default `OPENAI_API_KEY` of the environment,
            which is sent to https and this machine only.
        max_difference_nats: As in `check_log_probs`.

    Raises:
        ImportError: If `openai` isn't installed.
        ValueError: If an argument isn't what it has to be.
    """

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        base_url: str | None = None,
        *,
        end_token_ids: Sequence[int],
        max_new_tokens: int,
        model: str | None = None,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 900.0,
        adapters: bool = False,
        on_update: Callable[[Path], object] | None = None,
        concurrency: int = 256,
        timeout_seconds: float = 600.0,
        max_retries: int = 5,
        api_key: str | None = None,
        max_difference_nats: float | None = None,
    ) -> None:
        self.end_token_ids = read_end_tokens(end_token_ids)
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.concurrency = check_count("concurrency", concurrency)
        check_positive("start_seconds", start_seconds)
        self.max_difference_nats = max_difference_nats
        self.reads = "adapter" if adapters else "export"
        self.model = model
        self.command = None if command is None else list(command)
        self.environment = dict(environment or {})
        self.start_seconds = start_seconds
        self.on_update = on_update
        self._check_arguments(base_url)
        self._options: Any = {
            "api_key": api_key,
            "timeout_seconds": check_positive(
                "timeout_seconds", timeout_seconds
            ),
            "max_retries": check_count("max_retries", max_retries, at_least=0),
        }
        self._server: Server | None = None
        self._adapter: str | None = None
        # Made before a server of its own runs, too, to find `openai` missing.
        self._client = ServerClient(base_url or "", **self._options)

    def generate(self, prompts: Prompts, *, seed: int) -> list[Completion]:
        """Draws one completion for each prompt.

        Args:
            prompts: Token ids of each prompt.
            seed: Non-negative. Request i is sent with `seed + i`, modulo
                2**31; what a server makes of it is up to the server.

        Returns:
            Completions in the order of the prompts.

        Raises:
            ValueError: If a prompt is empty, the server refuses a request, an
                answer isn't a whole completion, or there is no server yet.
            ConnectionError: If the server can't be reached, breaks off, or
                is failing or busy.
            TimeoutError: If it sends nothing for `timeout_seconds`.
        """
        [completions] = self.generate_shards([(prompts, seed)])
        return completions

    def generate_shards(
        self, shards: Iterable[tuple[Prompts, int]]
    ) -> Iterator[list[Completion]]:
        """As `Engine.generate_shards`: the prompts of all are one queue."""
        queue, sizes = [], []
        for prompts, seed in shards:
            check_prompts(prompts, limit=None)
            sizes.append(len(prompts))
            queue += [(p, (seed + i) % 2**31) for i, p in enumerate(prompts)]
        if self.command and self._server is None:
            raise ValueError(
                "There is no server yet. Give `update` the folder to serve."
            )
        request = {
            **_SAMPLING,
            "model": self._adapter or self.model or self._first_model(),
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": self.end_token_ids,
        }
        answers = self._client.ask_all(
            "/completions",
            queue,
            lambda item: {
                **request,
                "prompt": [int(i) for i in item[0]],
                "seed": item[1],
            },
            lambda text: read_completion(
                text, self.end_token_ids, self.max_new_tokens
            ),
            self.concurrency,
        )
        try:
            for size in sizes:
                yield [next(answers) for _ in range(size)]
        except (ConnectionError, TimeoutError) as error:
            if self._server is not None:
                error.add_note(self._server.last_lines())
            raise
        finally:
            answers.close()

    def update(self, folder: str | Path) -> None:
        """Generates from other weights from now on.

        Args:
            folder: Of the exported model or, with `adapters`, of the adapter.

        Raises:
            RuntimeError: If the server that is started ends.
            TimeoutError: If it isn't healthy within `start_seconds`.
            ValueError: If the server refuses the adapter, or nothing gives
                it other weights.
        """
        folder = Path(folder).absolute()
        is_there = self._server is not None and self._server.is_healthy()
        if self.command and (self.reads == "export" or not is_there):
            self._start(folder)
        if self.reads == "adapter":
            self._load_adapter(folder)
        elif self.on_update is not None:
            self.on_update(folder)
        elif not self.command:
            raise ValueError(
                f"{self._client.where} still has the old weights: expected "
                f"`on_update` to load {folder}, received None. Pass a "
                "function that reloads or restarts the server."
            )

    def get_config(self) -> dict[str, Any]:
        """What decides the completions, beside model, prompts and seed."""
        return {
            "end_token_ids": self.end_token_ids,
            "max_new_tokens": self.max_new_tokens,
        }

    def close(self) -> None:
        """Ends the server that was started, which frees its memory."""
        if self._server is not None:
            self._server.close()
        self._server = self._adapter = None

    def _start(self, folder: Path) -> None:
        self.close()
        self._server = Server(
            self.command or (),
            folder,
            environment={
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
                **self.environment,
            },
            log=folder.with_name("server.log"),
            start_seconds=self.start_seconds,
        )
        self._client = ServerClient(f"{self._server.url}/v1", **self._options)

    def _first_model(self) -> str:
        text = self._client.ask("/models")
        try:
            return str(json.loads(text)["data"][0]["id"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self._client.where} doesn't say which models it has. "
                "Expected OpenAI's list of at least one, received "
                f"{text[:200]!r}. Check `base_url`, or pass `model`."
            ) from error

    def _load_adapter(self, folder: Path) -> None:
        """Another name each time: servers keep what they know by name."""
        old, name = self._adapter, f"keras_iris_{uuid.uuid4().hex[:8]}"
        self._client.ask(
            "/load_lora_adapter",
            {"lora_name": name, "lora_path": str(folder)},
        )
        self._adapter = name
        if old is not None:
            self._client.ask("/unload_lora_adapter", {"lora_name": old})

    def _check_arguments(self, base_url: str | None) -> None:
        """Refuses what doesn't go together, before anything runs."""
        if (base_url is None) != bool(self.command):
            raise ValueError(
                "Expected either the `base_url` of a server that runs or the "
                f"`command` of one to start. Received: {base_url!r} and "
                f"{self.command!r}."
            )
        places = ["{folder}", "{port}"]
        needed = places[1:] if self.reads == "adapter" else places
        text = " ".join(self.command or needed)
        if [place for place in places if place in text] != needed:
            raise ValueError(
                f"Expected `command` to name {' and '.join(needed)} "
                f"with adapters={self.reads == 'adapter'}. Received: {text}"
            )
