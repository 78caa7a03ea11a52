"""Greedy answers that end at stop strings."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from keras_iris.generation import KerasEngine
from keras_iris.lm_eval.continuations import lengths_up_to

# Tokens between two looks for stop strings.
_STEP_TOKENS = 64


class GreedyAnswers:
    """Answers prompts with the likeliest token each time.

    A compiled decoding loop knows no texts. So it ends an answer at a token
    with a stop string in it, and draws a few tokens at a time; prompts without
    a stop string among their answers go on, with the answers as part of the
    prompts. Whatever the limit, few shapes are compiled.

    Args:
        causal_lm: A model of `keras_iris.load`.
        batch_size: Prompts that are answered together.
        max_length: Tokens of prompt and answer together.
    """

    def __init__(
        self, causal_lm: Any, *, batch_size: int, max_length: int
    ) -> None:
        self.causal_lm = causal_lm
        self.batch_size = batch_size
        self.max_length = max_length
        self._tokenizer = causal_lm.tokenizer
        self._engine = functools.lru_cache(self._make_engine)
        self._ends = functools.lru_cache(self._find_ends)

    def __call__(
        self,
        prompts: Sequence[list[int]],
        stops: Sequence[Iterable[str]],
        limit: int,
    ) -> list[str]:
        """The texts of answers, without stop strings and special tokens.

        Args:
            prompts: Token ids, at most `max_length - limit` of each.
            stops: Stop strings of each, special tokens' among them.
            limit: The most tokens of an answer.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        ends = frozenset.intersection(*map(self._ends, map(frozenset, stops)))
        active = list(range(len(prompts)))
        while active:
            room = limit - max(len(answers[i]) for i in active)
            engine = self._engine(min(_STEP_TOKENS, room), ends)
            completions = engine.generate(
                [prompts[i] + answers[i] for i in active], seed=0
            )
            unfinished = []
            for i, completion in zip(active, completions, strict=True):
                answers[i] += completion.token_ids
                text = self._tokenizer.decode(answers[i])
                is_over = any(stop in text for stop in stops[i])
                is_over |= answers[i][-1] in self._tokenizer.end_token_ids
                if not is_over and len(answers[i]) < limit:
                    unfinished.append(i)
            active = unfinished
        return list(map(self._text, answers, stops))

    def _text(self, token_ids: list[int], stops: Iterable[str]) -> str:
        tokenizer = self._tokenizer
        ends = set(tokenizer.end_token_ids)
        for stop in set(stops) & set(tokenizer.special_tokens):
            ends.add(tokenizer.encode(stop)[0])
        kept = itertools.takewhile(lambda i: i not in ends, token_ids)
        text = tokenizer.decode(kept, skip_special=True)
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _find_ends(self, stops: frozenset[str]) -> frozenset[int]:
        """Ids of end tokens, and of those with a stop string in them."""
        return frozenset(self._tokenizer.end_token_ids) | {
            token_id
            for token_id, text in enumerate(self._texts)
            if any(stop in text for stop in stops)
        }

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The texts of all tokens that the model can draw."""
        size = self.causal_lm.backbone.token_embedding.input_dim
        size = min(size, self._tokenizer.vocabulary_size)
        return [self._tokenizer.decode([i]) for i in range(size)]

    def _make_engine(
        self, max_new_tokens: int, ends: frozenset[int]
    ) -> KerasEngine:
        return KerasEngine(
            self.causal_lm,
            end_token_ids=sorted(ends),
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            pad_token_id=self._tokenizer.pad_token_id,
            bucket_lengths=lengths_up_to(self.max_length - max_new_tokens),
            temperature=0,
        )
