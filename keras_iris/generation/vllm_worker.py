"""Runs vLLM in a process and environment of its own.

Started by `VLLMEngine` with the other environment's Python, so it imports
nothing of keras_iris. Reads JSON lines from stdin and answers each with one
line on the stream that was stdout; what vLLM prints goes to stderr. Ends at
the end of stdin or, in the middle of an answer, with its parent.

    {"folder": ..., "options": {...}}                       -> {"ready": true}
    {"prompts": [[...]], "seeds": [...], "end_token_ids": [...],
     "max_new_tokens": n}  -> {"completions": [{"token_ids": [...],
                               "log_probs": [...], "finish_reason": ...}]}
    an error                                 -> {"error": "Type: message"}
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any


def load(message: dict[str, Any]) -> Any:
    """A vLLM engine of the folder."""
    from vllm import LLM  # type: ignore[import-not-found]

    # The ids are given, and the folder's own sampling defaults aren't wanted.
    return LLM(
        model=message["folder"],
        skip_tokenizer_init=True,
        generation_config="vllm",
        **message["options"],
    )


def generate(llm: Any, message: dict[str, Any]) -> list[dict[str, Any]]:
    """One completion for each prompt, at temperature 1 from all tokens."""
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            temperature=1.0,
            top_p=1.0,
            top_k=-1,
            min_p=0.0,
            seed=seed,
            max_tokens=message["max_new_tokens"],
            stop_token_ids=message["end_token_ids"],
            ignore_eos=True,  # the end tokens are ours, not the folder's
            logprobs=0,  # of the sampled token only
            detokenize=False,
        )
        for seed in message["seeds"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in message["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [describe(output.outputs[0]) for output in outputs]


def describe(output: Any) -> dict[str, Any]:
    """What goes back of one completion."""
    token_ids = [int(i) for i in output.token_ids]
    steps = zip(token_ids, output.logprobs, strict=True)
    return {
        "token_ids": token_ids,
        "log_probs": [step[token_id].logprob for token_id, step in steps],
        "finish_reason": output.finish_reason,
    }


def end_with_parent(is_busy: threading.Event) -> None:
    """Kills this process group if there is nobody left to answer."""
    parent = os.getppid()
    while os.getppid() == parent or not is_busy.is_set():
        time.sleep(0.5)
    # vLLM's own processes are in the group, and hold the device.
    os.killpg(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Answers messages until stdin ends."""
    # vLLM and its child processes print to stdout, which is ours.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Or a process of vLLM that outlives this one keeps the stream open.
    os.register_at_fork(after_in_child=answers.close)
    is_busy = threading.Event()
    threading.Thread(
        target=end_with_parent, args=(is_busy,), daemon=True
    ).start()
    llm = None
    answer: dict[str, Any]
    for line in sys.stdin:
        is_busy.set()
        try:
            message = json.loads(line)
            if "folder" in message:
                llm = load(message)
                answer = {"ready": True}
            else:
                answer = {"completions": generate(llm, message)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        is_busy.clear()


if __name__ == "__main__":
    main()
