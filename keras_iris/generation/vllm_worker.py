"""Runs vLLM in a process and environment of its own.

Started by `VLLMEngine` with the other environment's Python, so it imports
nothing of keras_iris. Reads JSON lines from stdin and answers each with one
line on the stream that was stdout; what vLLM prints goes to stderr.

    {"folder": ..., "options": {...}}                       -> {"ready": true}
    {"prompts": [[...]], "seeds": [...], "end_token_ids": [...],
     "max_new_tokens": n}  -> {"completions": [{"token_ids": [...],
                               "log_probs": [...], "finish_reason": ...}]}
    an error                                 -> {"error": "Type: message"}
"""

import json
import os
import sys
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


def main() -> None:
    """Answers messages until stdin ends."""
    # vLLM and its child processes print to stdout, which is ours.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    llm = None
    answer: dict[str, Any]
    for line in sys.stdin:
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


if __name__ == "__main__":
    main()
