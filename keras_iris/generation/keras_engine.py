"""Generation with a KerasHub causal LM in this process."""

from collections.abc import Sequence
from typing import Any

import keras_hub
import numpy as np

from keras_iris import backend
from keras_iris.arguments import check_between, check_count, check_shared
from keras_iris.data.buckets import check_bucket_lengths, next_power_of_two
from keras_iris.generation.batch_plan import (
    DEFAULT_BUCKET_LENGTHS,
    Batch,
    pad_prompts,
    plan_prompts,
)
from keras_iris.generation.batch_rows import (
    DEFAULT_ROWS,
    gathered_bytes,
    read_sizes,
    row_bytes,
    rows_that_fit,
)
from keras_iris.generation.decoder import Decoder
from keras_iris.generation.draw import NUMBERS, make_noise
from keras_iris.generation.engine import (
    Completion,
    Engine,
    Prompt,
    Prompts,
    check_prompts,
    read_end_tokens,
)


class KerasEngine(Engine):
    """Draws completions from a KerasHub causal LM.

    By default from the model itself: temperature 1, no top-k, no top-p.
    Prompts are sorted by length into batches of a few shapes, so that each
    shape is compiled once, at its first use, and never for another seed,
    changed weights or a last incomplete batch. An answer that is over makes
    room for the next prompt with Llama, Mistral and Qwen models; else a batch
    ends with its longest answer. Each call reads the current weights. The
    model's own sampler, its preprocessor and its compiled functions are
    neither used nor changed.

    The same seed, prompts and weights give the same completions on one
    backend and machine, also in another process and in batches of another
    size, as far as sums of another order round to the same. The noise of a
    prompt depends on its place among the prompts of the call, not on the
    prompt.

    Args:
        causal_lm: A `keras_hub.models.CausalLM` with a decoding cache; its
            `preprocessor` may be `None`.
        end_token_ids: A completion ends with the first of these, which is
            kept.
        max_new_tokens: A completion ends after so many tokens at the latest.
        batch_size: Prompts that are answered together. By default as many as
            fit into 0.8 of the memory that is free, counted for each bucket
            length from the model's sizes: a power of two for each device, at
            most 1,024, and not more than the prompts need. 32 where nobody
            tells how much is free, as on CPUs.
        pad_token_id: Any id of the vocabulary.
        bucket_lengths: Increasing lengths, in tokens, that prompts are padded
            to; one compilation for each that occurs. The last is the longest
            prompt that is answered. By default the powers of two from 16 to
            4,096, and 192 and 384.
        temperature: Divides the logits. Self-play needs 1; 0 takes the
            likeliest token, and its log-prob is that at temperature 1.

    Raises:
        ValueError: If an argument can't be used.

    Examples:
        ```python
        engine = KerasEngine(causal_lm, end_token_ids=(2,), max_new_tokens=64)
        completions = engine.generate([[1, 5, 9], [1, 7]], seed=0)
        completions[0].token_ids
        ```
    """

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        causal_lm: Any,
        *,
        end_token_ids: Sequence[int],
        max_new_tokens: int,
        batch_size: int | None = None,
        pad_token_id: int = 0,
        bucket_lengths: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        _check_model(causal_lm)
        self.causal_lm = causal_lm
        self.temperature = check_between("temperature", temperature, 0, 100)
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.batch_size = batch_size
        if batch_size is not None:
            check_count("batch_size", batch_size)
            if backend.is_cut():
                count = backend.num_batch_shares()
                check_shared("batch_size", batch_size, count)
        self.end_token_ids = read_end_tokens(end_token_ids)
        self.vocabulary_size = causal_lm.backbone.token_embedding.input_dim
        self._check_ids("end_token_ids", self.end_token_ids)
        self._check_ids("pad_token_id", (pad_token_id,))
        self.pad_token_id = pad_token_id
        if bucket_lengths is None:
            bucket_lengths = DEFAULT_BUCKET_LENGTHS
        self.bucket_lengths = check_bucket_lengths(bucket_lengths)
        self._sizes = read_sizes(causal_lm.backbone)
        self._rows: dict[int, int] = {}  # of a device, by bucket length
        self._decoder = Decoder(
            causal_lm,
            temperature=self.temperature,
            end_token_ids=self.end_token_ids,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
        )

    def generate(self, prompts: Prompts, *, seed: int) -> list[Completion]:
        """Draws one completion for each prompt.

        Args:
            prompts: Token ids of each prompt.
            seed: Non-negative.

        Returns:
            Completions with log-probs, in the order of the prompts.

        Raises:
            ValueError: If a prompt is empty, longer than the last bucket, or
                has an id that the model doesn't know, before anything is
                generated.
        """
        check_prompts(prompts, self.bucket_lengths[-1])
        for i, prompt in enumerate(prompts):
            self._check_ids(f"prompt {i}", prompt)
        if not len(prompts):
            return []
        plan = plan_prompts(
            [len(prompt) for prompt in prompts],
            self._num_rows(len(prompts)),
            self._decoder.waves,
        )
        completions: dict[int, Completion] = {}
        for batch in plan:
            completions.update(self._answer(prompts, batch, seed))
        return [completions[i] for i in range(len(prompts))]

    def get_config(self) -> dict[str, Any]:
        """What decides the completions, beside model, prompts and seed."""
        return {
            "end_token_ids": self.end_token_ids,
            "max_new_tokens": self.max_new_tokens,
            "bucket_lengths": self.bucket_lengths,
            "temperature": self.temperature,
        }

    def _num_rows(self, num_prompts: int) -> dict[int, int]:
        """Rows of a batch by bucket length."""
        if self.batch_size is not None:
            return dict.fromkeys(self.bucket_lengths, self.batch_size)
        shares = backend.num_row_shares()
        sizes, free = self._sizes, backend.free_bytes()
        if sizes is not None and free is not None:
            variables = self.causal_lm.variables
            free -= int(gathered_bytes(variables, sizes.item_bytes))
        for length in self.bucket_lengths:
            rows = max(1, DEFAULT_ROWS // shares)
            if sizes is not None and free is not None:
                size = row_bytes(
                    sizes, prompt_length=length, new_tokens=self.max_new_tokens
                )
                rows = rows_that_fit(size, free)
            # Never more again: another number is another compilation.
            self._rows[length] = min(rows, self._rows.get(length, rows))
        enough = next_power_of_two(-(-num_prompts // shares))
        return {n: shares * min(r, enough) for n, r in self._rows.items()}

    def _check_ids(self, name: str, token_ids: Prompt) -> None:
        if min(token_ids) < 0 or max(token_ids) >= self.vocabulary_size:
            raise ValueError(
                f"Expected ids below {self.vocabulary_size}, the model's "
                f"vocabulary, in {name}. Received: {list(token_ids)}. Use the "
                "tokenizer that the model was trained with."
            )

    def _answer(
        self, prompts: Prompts, batch: Batch, seed: int
    ) -> dict[int, Completion]:
        inputs = pad_prompts(
            prompts,
            batch,
            pad_token_id=self.pad_token_id,
            waves=self._decoder.waves,
        )
        num_numbers = NUMBERS * self.max_new_tokens
        noise = np.zeros((len(inputs["lengths"]), num_numbers), "float32")
        if self.temperature:  # else nothing is drawn
            for row, index in enumerate(batch.indices):
                noise[row] = make_noise(seed, index, self.max_new_tokens)
        answers = self._decoder({**inputs, "noise": noise})
        # Rows without a prompt are the last ones.
        return {
            index: self._cut(*row)
            for index, *row in zip(batch.indices, *answers, strict=False)
        }

    def _cut(self, token_ids: np.ndarray, log_probs: np.ndarray) -> Completion:
        """Everything up to and including the first end token."""
        ends = np.flatnonzero(np.isin(token_ids, self.end_token_ids))
        length = ends[0] + 1 if len(ends) else len(token_ids)
        return Completion(
            tuple(token_ids[:length].tolist()),
            "stop" if len(ends) else "length",
            log_probs[:length].astype("float32"),
        )


def _check_model(causal_lm: Any) -> None:
    decodes = getattr(type(causal_lm), "call_with_cache", None) is not None
    if not isinstance(causal_lm, keras_hub.models.CausalLM) or not decodes:
        raise ValueError(
            "Expected `causal_lm` to be a keras_hub.models.CausalLM with a "
            "decoding cache (`call_with_cache`), received "
            f"{type(causal_lm).__name__}. Use another model, or another "
            "engine."
        )
