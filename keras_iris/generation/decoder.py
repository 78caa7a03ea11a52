"""Prefill and decoding of one batch, compiled by KerasHub's machinery."""

from typing import Any

import keras_hub
from keras import ops

from keras_iris import backend
from keras_iris.generation.cached_forward import cached_forward
from keras_iris.generation.draw import NUMBERS, draw
from keras_iris.models.checks import check_length


class Decoder:
    """Answers a batch of prompts with a causal LM and its cache.

    `keras_hub.models.CausalLM.make_generate_function` compiles the
    `generate_step` of whatever it is called on, with the current values of
    the variables as inputs. Here that is this object, so that the causal
    LM's own sampler and compiled functions stay as they are.

    KerasHub's own `generate_step` (0.32) isn't used because it prefills the
    new tokens' positions too, computes the logits of every prompt position,
    makes rows with long prompts wait for those with short ones, goes on to
    the end of the bucket, and keeps no log-probs.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
        temperature: Divides the logits; 0 takes the likeliest token.
        end_token_ids: A row ends with any of these.
        max_new_tokens: A row ends after so many.
        pad_token_id: What follows the end of a row.
    """

    def __init__(
        self,
        causal_lm: Any,
        *,
        temperature: float,
        end_token_ids: tuple[int, ...],
        max_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        self.causal_lm = causal_lm
        self.forward = cached_forward(causal_lm)
        self.is_greedy = not temperature
        # Its loop and softmax; it draws nothing.
        self.sampler = keras_hub.samplers.Sampler(temperature or 1.0)
        self.end_token_ids = end_token_ids
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        # Read by make_generate_function.
        self.generate_function: Any = None
        self.run_eagerly = False
        self.jit_compile = True
        self._variable_ids: list[int] = []

    @property
    def trainable_variables(self) -> list[Any]:
        """Those of the causal LM, as they are now."""
        return list(self.causal_lm.trainable_variables)

    @property
    def non_trainable_variables(self) -> list[Any]:
        """Those of the causal LM, as they are now."""
        return list(self.causal_lm.non_trainable_variables)

    def __call__(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Answers one batch, compiling once for each shape.

        Args:
            inputs: `token_ids` int32 and `is_prompt` bool of shape
                `(batch, prompt_time)`; `starts` int32, where the new tokens of
                a row begin, and `is_real` bool, both of shape `(batch,)`;
                `noise` float32, `NUMBERS` of a new token after those of
                another, of shape `(batch, NUMBERS * max_new_tokens)`.

        Returns:
            Token ids (int32) and their log-probs (float32, in nats, 0 for
            prompts and padding), both arrays of shape
            `(batch, prompt_time + max_new_tokens)`.
        """
        # LoRA adds variables, which a traced function would not see.
        variable_ids = [id(v) for v in self.causal_lm.variables]
        if variable_ids != self._variable_ids:
            self.generate_function = None
            self._variable_ids = variable_ids
        generate = keras_hub.models.CausalLM.make_generate_function(self)
        outputs = generate(
            {name: backend.cut(array) for name, array in inputs.items()},
            stop_token_ids=self.end_token_ids,
        )
        token_ids, log_probs = map(backend.read, outputs)
        return token_ids, log_probs

    def generate_step(
        self, inputs: dict[str, Any], stop_token_ids: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """What is compiled: all new tokens of a batch."""
        prompts = ops.convert_to_tensor(inputs["token_ids"], "int32")
        is_prompt = ops.convert_to_tensor(inputs["is_prompt"], "bool")
        starts = ops.convert_to_tensor(inputs["starts"], "int32")
        is_real = ops.convert_to_tensor(inputs["is_real"], "bool")
        noise = ops.convert_to_tensor(inputs["noise"], "float32")
        total = prompts.shape[1] + self.max_new_tokens
        check_length(self.causal_lm, total)
        cache = self.forward.prefill(prompts, is_prompt, total)
        token_ids = ops.pad(
            prompts,
            ((0, 0), (0, self.max_new_tokens)),
            constant_values=self.pad_token_id,
        )  # (batch, total)
        ends = ops.convert_to_tensor(stop_token_ids, "int32")

        def decode_token(
            token_ids: Any, log_probs: Any, cache: Any, index: Any, active: Any
        ) -> tuple[Any, ...]:
            number = ops.clip(index - starts, 0, self.max_new_tokens - 1)
            columns = NUMBERS * number[:, None] + ops.arange(NUMBERS)
            sampled, sampled_log_probs, cache = self._sample(
                token_ids,
                cache,
                index,
                ops.take_along_axis(noise, columns, axis=1),
            )
            in_prompt = index < starts
            counts = ops.logical_and(active, ops.logical_not(in_prompt))
            written = ops.where(
                in_prompt,
                token_ids[:, index],
                ops.where(counts, sampled, self.pad_token_id),
            )
            at_end = ops.any(sampled[:, None] == ends[None, :], axis=-1)
            at_limit = index + 1 >= starts + self.max_new_tokens
            ended = ops.logical_and(counts, ops.logical_or(at_end, at_limit))
            return (
                _set_column(token_ids, index, written),
                _set_column(
                    log_probs, index, ops.where(counts, sampled_log_probs, 0.0)
                ),
                cache,
                index + 1,
                ops.logical_and(active, ops.logical_not(ended)),
            )

        token_ids, log_probs, *_ = self.sampler.run_loop(
            lambda ids, log_probs, cache, index, active: ops.any(active),
            decode_token,
            model=self.causal_lm,
            loop_vars=(
                token_ids,
                ops.zeros(token_ids.shape, "float32"),
                cache,
                ops.min(starts),
                is_real,
            ),
        )
        return token_ids, log_probs

    def _sample(
        self, token_ids: Any, cache: Any, index: Any, noise: Any
    ) -> tuple[Any, Any, Any]:
        """Ids for position `index`, `(batch,)`, their log-probs, the cache."""
        previous = ops.slice(
            token_ids, [0, index - 1], [token_ids.shape[0], 1]
        )  # (batch, 1)
        logits, cache = self.forward.step(previous, cache, index - 1)
        # (batch, vocabulary)
        probabilities = self.sampler.compute_probabilities(logits)
        sampled = (
            ops.cast(ops.argmax(probabilities, axis=-1), "int32")
            if self.is_greedy
            else draw(probabilities, noise)
        )  # (batch,)
        drawn = ops.take_along_axis(probabilities, sampled[:, None], axis=-1)
        return sampled, ops.log(drawn[:, 0]), cache


def _set_column(array: Any, index: Any, column: Any) -> Any:
    """Writes `(batch,)` numbers to `array[:, index]`."""
    return ops.slice_update(
        array, [0, index], ops.cast(column, array.dtype)[:, None]
    )
