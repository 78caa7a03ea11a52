"""Generation by an OpenAI-compatible server."""

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from keras_iris.arguments import check_count, check_positive
from keras_iris.data import Tokenizer
from keras_iris.generation.engine import Completion, check_prompts
from keras_iris.generation.server_response import read_completion

# The client tries these again, and every 5xx.
_BUSY = (408, 409, 429)
# Beyond OpenAI's own parameters. A server that doesn't know one ignores it.
# Servers' defaults cut the distribution (llama.cpp: top-k 40, min-p 0.05;
# vLLM and SGLang: what generation_config.json says), and self-play needs all
# of it.
_EXTRA_BODY = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,  # vLLM, SGLang
    "repeat_penalty": 1.0,  # llama.cpp
    "skip_special_tokens": False,
    "return_token_ids": True,  # vLLM, SGLang
    "n_probs": 1,  # llama.cpp, which gives ids with log-probs only
}


class ServerEngine:
    """Draws completions from vLLM, SGLang, llama.cpp or the like.

    Prompts are sent as token ids to `/completions`, one a request, each with
    a seed of its own, at temperature 1 without top-k, top-p, min-p or
    penalties. How ids come back is in `read_completion`: vLLM and SGLang give
    them, llama.cpp gives them with its log-probs.

    Connection errors, time-outs, and HTTP 408, 409, 429 and 5xx are tried
    again after growing pauses, or the pause that the server asks for; if that
    is longer than the client ever waits (two minutes), there is no further
    try. Needs the `openai` package: `pip install keras_iris[server]`. A key
    is read from the environment variable `OPENAI_API_KEY`, if it is set.

    Args:
        base_url: Such as `"http://127.0.0.1:8000/v1"`.
        model: The model's name on the server.
        tokenizer: That of the model; its end tokens end a completion.
        max_new_tokens: A completion ends after so many tokens at the latest.
        concurrency: Requests at a time.
        timeout_seconds: The longest wait for one answer.
        max_retries: Further tries of each request.
        on_update: Called by `update` with the folder of an exported model;
            has to make the server serve it, by a reload or a restart, and to
            return when it does. Typically `subprocess.run` of a command. It
            may not write into the folder, which the next export replaces.

    Raises:
        ImportError: If `openai` isn't installed.
        ValueError: If a limit isn't positive.
    """

    needs_folder = True

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        base_url: str,
        model: str,
        *,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        concurrency: int = 8,
        timeout_seconds: float = 120.0,
        max_retries: int = 5,
        on_update: Callable[[Path], object] | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        check_count("concurrency", concurrency)
        check_positive("timeout_seconds", timeout_seconds)
        check_count("max_retries", max_retries, at_least=0)
        self.base_url = base_url
        self.model = model
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.concurrency = concurrency
        self.timeout_seconds = timeout_seconds
        self.on_update = on_update
        self._openai = _import_openai()
        self._client = self._openai.OpenAI(
            base_url=base_url,
            # The client refuses to do without; local servers want none.
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout_seconds,
            max_retries=max_retries,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seed: int
    ) -> list[Completion]:
        """Draws one completion for each prompt.

        Args:
            prompts: Token ids of each prompt.
            seed: Non-negative. Request i is sent with `seed + i`, modulo
                2**31; what a server makes of it is up to the server.

        Returns:
            Completions in the order of the prompts.

        Raises:
            ValueError: If a prompt is empty, the server refuses a request, or
                an answer isn't a whole completion.
            ConnectionError: If the server can't be reached, breaks off, or
                is failing or busy.
            TimeoutError: If it takes longer than `timeout_seconds`.
        """
        check_prompts(prompts, limit=None)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            answers = [
                pool.submit(self._request, list(prompt), (seed + i) % 2**31)
                for i, prompt in enumerate(prompts)
            ]
            return [answer.result() for answer in answers]
        finally:
            # After an error, those not yet sent aren't.
            pool.shutdown(cancel_futures=True)

    def update(self, folder: str | Path) -> None:
        """Makes the server serve other weights.

        Args:
            folder: Of the exported model.

        Raises:
            ValueError: If there is no `on_update`.
        """
        if self.on_update is None:
            raise ValueError(
                f"The server at {self.base_url} still has the old weights: "
                f"expected `on_update` to load {folder}, received None. Pass "
                "a function that reloads or restarts the server."
            )
        self.on_update(Path(folder))

    def get_config(self) -> dict[str, Any]:
        """What decides the completions, beside model, prompts and seed."""
        return {
            "end_token_ids": tuple(self.tokenizer.end_token_ids),
            "max_new_tokens": self.max_new_tokens,
        }

    def _request(self, prompt: list[int], seed: int) -> Completion:
        openai, where = self._openai, f"The server at {self.base_url}"
        try:
            response = self._client.completions.with_raw_response.create(
                model=self.model,
                prompt=[int(i) for i in prompt],
                max_tokens=self.max_new_tokens,
                temperature=1.0,
                top_p=1.0,
                logprobs=1,
                seed=seed,
                extra_body={
                    **_EXTRA_BODY,
                    "stop_token_ids": list(self.tokenizer.end_token_ids),
                },
            )
        except openai.APITimeoutError as error:
            raise TimeoutError(
                f"{where} took longer than {self.timeout_seconds} seconds for "
                "an answer, with all retries. Raise `timeout_seconds`, or "
                "lower `concurrency`."
            ) from error
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"{where} can't be reached or broke off, with all retries "
                f"({error.__cause__ or error}). Check that it runs and that "
                "`base_url` is right."
            ) from error
        except openai.APIStatusError as error:
            raise _status_error(where, error, len(prompt)) from error
        return read_completion(
            _body(response), self.tokenizer, self.max_new_tokens
        )


def _status_error(where: str, error: Any, num_tokens: int) -> Exception:
    """Of a server that fails or is busy, or of one that refuses."""
    status = error.status_code
    if status < 500 and status not in _BUSY:
        return ValueError(
            f"{where} refused a prompt of {num_tokens} tokens with HTTP "
            f"status {status}: {error.message}. Expected 200. "
            "Check `model`, the key, and the server's context length."
        )
    pause = error.response.headers.get("retry-after")
    asked = "" if pause is None else f" (Retry-After: {pause})"
    return ConnectionError(
        f"{where} is failing or busy, with all retries: HTTP status {status}"
        f"{asked}, {error.message}. Expected 200. See what the server "
        "reports; once it answers, run again: self-play continues."
    )


def _body(response: Any) -> str:
    text = response.text
    return text() if callable(text) else text


def _import_openai() -> Any:
    try:
        return importlib.import_module("openai")
    except ImportError as error:
        raise ImportError(
            "ServerEngine needs the `openai` package, which isn't installed. "
            "Install it with: pip install keras_iris[server]"
        ) from error
