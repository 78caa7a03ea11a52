"""What every engine takes and gives: token ids."""

import abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Prompt = Sequence[int] | NDArray[np.integer[Any]]
Prompts = Sequence[Prompt]


@dataclass(frozen=True)
class Completion:
    """What a model answered to one prompt.

    Attributes:
        token_ids: Every id that was sampled, the end token included if there
            was one. Never ids of re-tokenised text.
        finish_reason: `"stop"` if the last id is an end token, `"length"` if
            the limit of new tokens came first.
        log_probs: float32 of shape `(len(token_ids),)`, in nats, of each id
            under the model at the engine's temperature, all ids of the
            vocabulary allowed. `None` if the engine doesn't tell.
    """

    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    log_probs: NDArray[np.float32] | None = None


class Engine(abc.ABC):
    """Something that answers prompts. One's own has only `generate`.

    Attributes:
        reads: Where its weights are from: `"trainer"` for the trainer's own
            variables; `"export"` or `"adapter"` for what `update` gets, the
            folder of an exported model or of a LoRA adapter.
        max_difference_nats: As in `check_log_probs`, for this engine.
    """

    reads: Literal["trainer", "export", "adapter"] = "trainer"
    max_difference_nats: float | None = None

    @abc.abstractmethod
    def generate(self, prompts: Prompts, *, seed: int) -> list[Completion]:
        """Draws one completion for each prompt.

        Args:
            prompts: Token ids of each prompt. One that is there several times
                gets a draw of its own each time.
            seed: Non-negative. The same seed, prompts and weights give the
                same completions.

        Returns:
            Completions, in the order of the prompts.
        """

    def generate_shards(
        self, shards: Iterable[tuple[Prompts, int]]
    ) -> Iterator[list[Completion]]:
        """What `generate` gives for each shard, as the answers come.

        An engine that answers many prompts at once needn't wait for the last
        answer of a shard before it begins the next.

        Args:
            shards: Prompts and seed of each.

        Yields:
            Completions of a shard, in the order of the shards.
        """
        for prompts, seed in shards:
            yield self.generate(prompts, seed=seed)

    def update(self, folder: Path) -> None:  # noqa: B027 (may do nothing)
        """Takes new weights, unless they are the trainer's.

        Args:
            folder: What `keras_iris.export` or, for an adapter,
                `keras_iris.hub.save_adapter` wrote.
        """

    def get_config(self) -> dict[str, Any]:
        """What decides the completions, beside model, prompts and seed.

        Self-play refuses to go on with a run under another one. Where and
        how fast the engine runs doesn't belong to it.
        """
        return {}


def read_end_tokens(end_token_ids: Any) -> tuple[int, ...]:
    """The ids that end an answer, of which there has to be one."""
    ids = end_token_ids
    found = tuple(map(int, ids if isinstance(ids, Iterable) else [ids]))
    if not found:
        raise ValueError(
            "Expected at least one id in `end_token_ids`, received none. Pass "
            "the `end_token_ids` of the model's tokenizer."
        )
    return found


def check_prompts(prompts: Prompts, limit: int | None) -> None:
    """Refuses prompts before any of them is answered.

    Args:
        prompts: Token ids of each prompt.
        limit: The longest prompt that can be answered, in tokens. `None` if
            only the engine knows.

    Raises:
        ValueError: If a prompt is empty or longer than `limit`.
    """
    lengths = [len(prompt) for prompt in prompts]
    empty = [i for i, length in enumerate(lengths) if length == 0]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(prompts)} prompts are empty, the first is "
            f"number {empty[0]}. Expected at least one token id in each, such "
            "as the beginning-of-sequence token. Drop these prompts or give "
            "them one."
        )
    too_long = [length for length in lengths if limit and length > limit]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(prompts)} prompts are too long: the "
            f"longest has {max(too_long)} tokens, the limit is {limit}. "
            "Tokenise with a smaller `max_prompt_length`, or make the engine "
            "with a larger last bucket length."
        )
