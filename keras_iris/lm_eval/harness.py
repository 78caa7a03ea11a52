"""Benchmarks of the LM Evaluation Harness (`pip install "keras_iris[eval]"`).

Nothing else of the package imports this module, or `lm_eval`.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from keras_iris import backend
from keras_iris.lm_eval.answers import GreedyAnswers
from keras_iris.lm_eval.cache import (
    check_cache,
    fingerprint,
    keep_json,
)
from keras_iris.lm_eval.continuations import ContinuationScorer

__all__ = ["TEN", "KerasLM", "evaluate"]

# Batches that are computed before the harness' cache gets their results.
_ROUND_BATCHES = 8
# Where a model doesn't say: what the harness takes.
_MAX_LENGTH = 2048


# The ten benchmarks that papers on self-play report: the harness' task or group
# of tasks, solved examples in each prompt, and the score in its results.
# `leaderboard_` are those of the second Open LLM Leaderboard. Its IFEval has
# the prompts and scores of `ifeval`, but imports what setuptools has no more.
TEN = {
    "GSM8K": ("gsm8k", 5, "exact_match,strict-match"),
    "MATH-hard": ("leaderboard_math_hard", 4, "exact_match,none"),
    "MUSR": ("leaderboard_musr", 0, "acc_norm,none"),
    "MMLU": ("mmlu", 5, "acc,none"),
    "MMLU-Pro": ("leaderboard_mmlu_pro", 5, "acc,none"),
    "GPQA": ("leaderboard_gpqa", 0, "acc_norm,none"),
    "HellaSwag": ("hellaswag", 10, "acc_norm,none"),
    "WinoGrande": ("winogrande", 5, "acc,none"),
    "BBH": ("leaderboard_bbh", 3, "acc_norm,none"),
    "IFEval": ("ifeval", 0, "prompt_level_strict_acc,none"),
}


def evaluate(
    causal_lm: Any,
    tasks: str | Sequence[Any] = "ten",
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on benchmarks, by `lm_eval.simple_evaluate`.

    Args:
        causal_lm: A model of `keras_iris.load`.
        tasks: `"ten"` for `TEN`, or a list of what `simple_evaluate` takes.
        batch_size: As in `KerasLM`.
        max_length: As in `KerasLM`.
        **options: Others of `simple_evaluate`, such as `limit=100`,
            `apply_chat_template=True` or, to go on after a crash,
            `use_cache="runs/own/harness"`. Not `cache_requests`, which
            unpickles what it finds.

    Returns:
        The harness' results; those of `TEN` have their scores, between 0 and
        1, as `results["ten"]`. In processes of `torchrun` but the first, an
        empty dictionary.

    Raises:
        ValueError: An option or the cache can't be used, or as in `KerasLM`.
    """
    if options.get("cache_requests"):
        raise ValueError(
            "`cache_requests` isn't taken: the harness unpickles what it finds "
            "there, which may run anything. `use_cache` keeps the results."
        )
    model = KerasLM(causal_lm, batch_size=batch_size, max_length=max_length)
    is_ten = tasks == "ten"
    if is_ten:
        options["task_manager"] = options.get("task_manager") or TaskManager()
        tasks = _load_ten(options["task_manager"])
    if use_cache := options.get("use_cache"):
        check_cache(Path(use_cache))
    results: dict[str, Any] | None = lm_eval.simple_evaluate(
        model=model,
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        **options,
    )
    if results is None:
        return {}
    if is_ten:
        results["ten"] = {
            name: results["results"][task][metric]
            for name, (task, _, metric) in TEN.items()
        }
    return results


def _load_ten(manager: TaskManager) -> list[Any]:
    """Tasks and groups of `TEN`; `simple_evaluate` has one number of shots."""
    loaded = manager.load([task for task, *_ in TEN.values()])
    found = []
    for name, num_fewshot, _ in TEN.values():
        if name in loaded["groups"]:
            found.append(loaded["groups"][name])
            tasks = found[-1].get_all_tasks()
        else:
            found.append(loaded["tasks"][name])
            tasks = found[-1:]
        for task in tasks:
            task.set_config("num_fewshot", num_fewshot)
    return found


class KerasLM(TemplateLM):
    """A model as the harness takes it: `simple_evaluate(model=KerasLM(...))`.

    Log-probs and answers are those of the harness' own `hf` model on the same
    checkpoint. Answers are greedy. Where each process computes on its own, as
    with `torchrun`, it has its share of the examples.

    Args:
        causal_lm: A model of `keras_iris.load`, with its `tokenizer` and
            `chat_template`.
        batch_size: Texts of a forward pass, and prompts that are answered
            together.
        max_length: Tokens of context and answer; longer contexts lose their
            beginning. Defaults to the model's `max_position_embeddings`, or
            2048.

    Raises:
        ValueError: If the model has no tokenizer, or can't be used.
    """

    def __init__(
        self,
        causal_lm: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        tokenizer = getattr(causal_lm, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "Expected a model with a tokenizer, from `keras_iris.load`. "
                f"Received: {type(causal_lm).__name__} without one."
            )
        template = getattr(causal_lm, "chat_template", None)
        if max_length is None:
            longest = getattr(causal_lm, "max_position_embeddings", None)
            max_length = longest or _MAX_LENGTH
        if not backend.IS_ONE_PROGRAM:
            self._rank = backend.process_index()
            self._world_size = backend.process_count()
        self._causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.template = template and template.bind(tokenizer)
        self.max_length = max_length
        self._scorer = ContinuationScorer(
            causal_lm, batch_size=batch_size, max_length=max_length
        )
        self.batch_size = self._scorer.batch_size
        self._answers = GreedyAnswers(
            causal_lm, batch_size=self.batch_size, max_length=max_length
        )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Takes the harness' cache, as JSON and by model."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            model = fingerprint(
                self._causal_lm, self.tokenizer, self.max_length
            )
            keep_json(cache_hook.dbdict, model)

    def all_gather(self, tensor: Any) -> Any:
        """The numbers of all processes."""
        numbers = backend.exchange(str(tensor.item()))
        return tensor.new_tensor([float(n) for n in numbers])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """What all processes have; None but in process `dst`."""
        found = backend.exchange(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for the other processes."""
        backend.exchange("")

    @property
    def eot_token_id(self) -> int:
        """The usual end token."""
        return self.tokenizer.end_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What a text without context begins with."""
        template, tokenizer = self.template, self.tokenizer
        named = template and (template.bos_token or template.eos_token)
        if named:
            return tokenizer.encode(named)[0]
        return (*tokenizer.start_token_ids, self.eot_token_id)[0]

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached prompts apart by."""
        return self.tokenizer.fingerprint()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The token ids of a text.

        Args:
            string: The text; special tokens' strings in it become their ids.
            add_special_tokens: Whether the start token is put before it. By
                default it is where the text doesn't begin with it itself.
        """
        ids = self.tokenizer.encode(string)
        start = list(self.tokenizer.start_token_ids)
        if add_special_tokens is None:
            add_special_tokens = ids[: len(start)] != start
        return start + ids if add_special_tokens else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, for the results."""
        return self.template.source if chat_template and self.template else None

    def apply_chat_template(
        self,
        chat_history: list[dict[str, str]],
        add_generation_prompt: bool = True,
    ) -> str:
        """The text of messages.

        Args:
            chat_history: The messages.
            add_generation_prompt: Whether the answer comes next. If not, it
                goes on with the last message.

        Raises:
            ValueError: If the model has no chat template, or it can't be
                rendered.
        """
        if self.template is None:
            raise ValueError(
                "The model has no chat template. Load it with `load(..., "
                "default_template=ChatTemplate.named('chatml'))`, or evaluate "
                "it without `apply_chat_template`."
            )
        if add_generation_prompt:
            return self.template.render_prompt(chat_history)
        *history, last = chat_history
        text = self.template.render(history, last["content"])
        begun, content = last["content"].lstrip(), last["content"].strip()
        start = text.rindex(content)
        if not text.startswith(begun, start):
            begun = content  # the template strips it
        return text[:start] + begun

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probs, in nats, of continuations, and whether they are greedy."""
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(requests, "Log-probs", disable=disable_tqdm) as bar:
            for scores in self._scorer([request[1:] for request in requests]):
                found |= scores
                for i, score in scores.items():
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial(
                            "loglikelihood", requests[i][0], score
                        )
                bar.update(len(scores))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probs of whole texts, in nats, window by window."""
        results = []
        with tqdm(requests, "Texts", disable=disable_tqdm) as bar:
            for texts in self._rounds(
                [request.args[0] for request in requests]
            ):
                windows = [self._windows(text) for text in texts]
                scores = iter(
                    self._loglikelihood_tokens(
                        list(itertools.chain(*windows)), disable_tqdm=True
                    )
                )
                for text, parts in zip(texts, windows, strict=True):
                    total = sum(next(scores)[0] for _ in parts)
                    self.cache_hook.add_partial(
                        "loglikelihood_rolling", (text,), total
                    )
                    results.append(total)
                bar.update(len(texts))
        return results

    def _windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        """Requests that ask for each token of a text once."""
        windows = get_rolling_token_windows(
            self.tok_encode(text),
            self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Greedy answers, up to a stop string, an end token or a limit."""
        prompts = [self._read(*request.args) for request in requests]
        order = sorted(
            range(len(prompts)),
            key=lambda i: (prompts[i].limit, -len(prompts[i].token_ids)),
        )
        found = {}
        with tqdm(requests, "Answers", disable=disable_tqdm) as bar:
            for limit, group in itertools.groupby(
                order, key=lambda i: prompts[i].limit
            ):
                for places in self._rounds(list(group)):
                    texts = self._answers(
                        [prompts[i].token_ids for i in places],
                        [prompts[i].until for i in places],
                        limit,
                    )
                    for i, text in zip(places, texts, strict=True):
                        found[i] = text
                        self.cache_hook.add_partial(
                            "generate_until", requests[i].args, text
                        )
                    bar.update(len(places))
        return [found[i] for i in range(len(requests))]

    def _read(self, context: str, options: dict[str, Any]) -> "_Prompt":
        given, options = options, dict(normalize_gen_kwargs(options))
        limit = options.pop("max_gen_toks")
        end = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(options.pop("until"), end)
        if options.pop("do_sample") or options.keys() - {"temperature"}:
            raise ValueError(
                "Answers are greedy. Expected nothing but `until`, "
                f"`max_gen_toks` and `do_sample: false`. Received: {given}"
            )
        room = self.max_length - limit
        if room < 1:
            raise ValueError(
                f"Answers of up to max_gen_toks={limit} tokens leave no room "
                f"for a prompt in max_length={self.max_length}. Pass "
                "`gen_kwargs={'max_gen_toks': ...}`, or leave out the task."
            )
        token_ids = self.tok_encode(context) or [self.prefix_token_id]
        return _Prompt(token_ids[-room:], [u for u in until if u], limit)

    def _rounds(self, items: list[Any]) -> Iterator[list[Any]]:
        """As many at a time as may be lost in a crash."""
        size = _ROUND_BATCHES * self.batch_size
        for start in range(0, len(items), size):
            yield items[start : start + size]


class _Prompt(NamedTuple):
    """Token ids, stop strings, and the most tokens of an answer."""

    token_ids: list[int]
    until: list[str]
    limit: int
