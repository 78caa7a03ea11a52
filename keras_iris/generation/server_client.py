"""HTTP to an OpenAI-compatible server, many requests at a time."""

import asyncio
import contextlib
import importlib
import ipaddress
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# The client tries these again, and every 5xx.
_BUSY = (408, 409, 429)


class ServerClient:
    """Posts JSON, and yields what comes back.

    Args:
        base_url: Such as `"http://127.0.0.1:8000/v1"`.
        api_key: Sent to it. By default `OPENAI_API_KEY` of the environment,
            to https and this machine only.
        timeout_seconds: The longest wait for a server that sends nothing.
        max_retries: Further tries of each request.

    Raises:
        ImportError: If `openai` isn't installed.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout_seconds: float,
        max_retries: int,
    ) -> None:
        self.where = f"The server at {base_url}"
        try:
            self._openai: Any = importlib.import_module("openai")
            anyio: Any = importlib.import_module("anyio.from_thread")
        except ImportError as error:
            raise ImportError(
                "ServerEngine needs the `openai` package, which isn't "
                "installed. Install it with: pip install keras_iris[server]"
            ) from error
        self._start_portal = anyio.start_blocking_portal
        self._seconds = timeout_seconds
        is_here = _is_loopback(base_url)
        if api_key is None and (is_here or base_url.startswith("https://")):
            api_key = os.environ.get("OPENAI_API_KEY")
        self._options = {
            "base_url": base_url,
            # The client refuses to do without; local servers want none.
            "api_key": api_key or "none",
            "timeout": timeout_seconds,
            "max_retries": max_retries,
        }
        # This machine's own addresses aren't behind its proxy.
        self._uses_proxy = not is_here

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer's text to one request, a GET where there is no body."""
        [text] = self.ask_all(path, [body], lambda body: body, str, 1)
        return text

    def ask_all(
        self,
        path: str,
        items: Sequence[Item],
        write: Callable[[Item], dict[str, Any] | None],
        read: Callable[[str], Answer],
        concurrency: int,
    ) -> Generator[Answer, None, None]:
        """Yields the answers in the order of the items.

        When it's closed or fails, requests on the way are broken off. Errors
        are those of `ServerEngine.generate`.

        Args:
            path: Such as `"/completions"`.
            items: What to ask for.
            write: An item's request.
            read: What is kept, and yielded, of an answer's text.
            concurrency: Requests at a time.
        """
        pool = self._openai.DefaultAsyncHttpxClient(trust_env=self._uses_proxy)
        client = self._openai.AsyncOpenAI(http_client=pool, **self._options)
        answers: deque[Future[Answer]] = deque(Future() for _ in items)
        # As a queue: what has been read is kept by its reader alone.
        waiting = deque(zip(items, answers, strict=True))

        async def work() -> None:
            while waiting:
                item, answer = waiting.popleft()
                try:
                    body = write(item)
                    send = client.get if body is None else client.post
                    options = {} if body is None else {"body": body}
                    text = await send(path, cast_to=str, **options)
                    answer.set_result(read(text))
                except Exception as error:
                    answer.set_exception(error)

        async def work_all() -> None:
            async with client:
                await asyncio.gather(*(work() for _ in range(concurrency)))

        try:
            # In a thread of its own: a notebook's has a loop already. It
            # breaks off what runs when this is left by an error.
            with self._start_portal() as portal:
                portal.start_task_soon(work_all)
                while answers:
                    yield answers.popleft().result()
        except self._openai.OpenAIError as error:
            raise self._translate(error) from error

    def _translate(self, error: Any) -> Exception:
        """The error of the client as one of ours."""
        if isinstance(error, self._openai.APITimeoutError):
            return TimeoutError(
                f"{self.where} took longer than {self._seconds} seconds for "
                "an answer, with all retries. Raise `timeout_seconds`, or "
                "lower `concurrency`."
            )
        status = getattr(error, "status_code", None)
        if status is None:
            return ConnectionError(
                f"{self.where} can't be reached or broke off, with all "
                f"retries ({error.__cause__ or error}). Check that it runs "
                "and that `base_url` is right."
            )
        if status < 500 and status not in _BUSY:
            return ValueError(
                f"{self.where} refused a request with HTTP status {status}: "
                f"{error.message}. Expected 200. Check `model`, `api_key`, "
                "and the server's context length."
            )
        pause = error.response.headers.get("retry-after")
        return ConnectionError(
            f"{self.where} is failing or busy, with all retries: HTTP status "
            f"{status}, Retry-After: {pause}, {error.message}. Expected 200. "
            "Once it answers, run again: self-play continues."
        )


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
