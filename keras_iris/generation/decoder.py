"""Answers to a queue of prompts, compiled by KerasHub's machinery."""

from typing import Any, NamedTuple

import keras_hub
from keras import ops, tree

from keras_iris import backend
from keras_iris.generation.cached_forward import CachedForward
from keras_iris.generation.draw import NUMBERS, draw
from keras_iris.generation.lockstep import Lockstep
from keras_iris.generation.rowwise import rowwise
from keras_iris.models.checks import check_length

# Prompts of a queue to a row of the batch. Rows are idle only at its end, and a
# signal is heard only there.
WAVES = 8
# The share of the rows that has to be over before the next prompts begin. Of
# few rows it is larger, up to four rows, as one prompt alone is read slowly.
SHARE_THAT_BEGINS = 1 / 8
_DTYPES = {
    "prompts": "int32",
    "lengths": "int32",
    "is_active": "bool",
    "noise": "float32",
}


class Rows(NamedTuple):
    """Prompts that are answered together: tensors of which each has a row.

    Attributes:
        places: Of the prompts in the queue; for no prompt, its length.
        prompts: Token ids, of shape `(rows, prompt_time)`.
        lengths: Of the prompts, in tokens.
        noise: `NUMBERS` of a new token after those of another.
        is_active: Whether the answer goes on.
        token_ids: The last tokens.
        positions: Theirs.
        cache: What came before them.
        answers: New token ids, of shape `(rows, max_new_tokens)`.
        log_probs: Theirs, in nats.
    """

    places: Any
    prompts: Any
    lengths: Any
    noise: Any
    is_active: Any
    token_ids: Any
    positions: Any
    cache: Any
    answers: Any
    log_probs: Any


class Decoder:
    """Answers prompts with a causal LM and its cache.

    A queue of prompts shares the rows of a batch: where enough answers are
    over, the next prompts get their rows, all in one compiled program.

    `keras_hub.models.CausalLM.make_generate_function` compiles the
    `generate_step` of whatever it is called on, with the current values of
    the variables as inputs. Here that is this object, so that the causal
    LM's own sampler and compiled functions stay as they are.

    KerasHub's own `generate_step` (0.32) isn't used because it prefills the
    new tokens' positions too, computes the logits of every prompt position,
    makes rows with long prompts wait for those with short ones, all rows for
    the longest answer, and keeps no log-probs.

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
        self.forward: CachedForward = rowwise(causal_lm) or Lockstep(causal_lm)
        self.temperature = temperature
        self.end_token_ids = end_token_ids
        self.max_new_tokens = max_new_tokens
        self.pad_token_id = pad_token_id
        # Read by make_generate_function.
        self.sampler = keras_hub.samplers.Sampler()
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

    @property
    def waves(self) -> int:
        """Prompts of a queue to a row; 1 where none can begin on its own."""
        # Rows that are cut over devices stay where they are.
        is_one = not self.forward.is_rowwise or backend.is_cut()
        return 1 if is_one else WAVES

    def __call__(self, inputs: dict[str, Any]) -> tuple[Any, Any]:
        """Answers a queue of prompts, compiling once for each shape.

        Args:
            inputs: `prompts` int32 of shape `(queue, prompt_time)`, padded on
                the right, `lengths` int32 and `is_active` bool, whether there
                is a prompt, both of shape `(queue,)`, and `noise` float32,
                `NUMBERS` of a new token after those of another, of shape
                `(queue, NUMBERS * max_new_tokens)`. `queue` is `waves` times
                the rows of a batch; what isn't active comes last.

        Returns:
            Token ids (int32) and their log-probs (float32, in nats), both
            arrays of shape `(queue, max_new_tokens)`. What follows an end
            token is padding, of log-prob 0.
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
        answers, log_probs = map(backend.read, outputs)
        return answers, log_probs

    def generate_step(
        self, inputs: dict[str, Any], stop_token_ids: tuple[int, ...]
    ) -> tuple[Any, Any]:
        """What is compiled: all new tokens of a queue."""
        size, prompt_time = inputs["prompts"].shape
        num_rows = size // self.waves
        check_length(self.causal_lm, prompt_time + self.max_new_tokens)
        # What KerasHub and Keras made of them depends on `floatx`.
        queue = {
            name: ops.convert_to_tensor(inputs[name], dtype)
            for name, dtype in _DTYPES.items()
        }
        queue["places"] = ops.arange(size, dtype="int32")
        ends = ops.convert_to_tensor(stop_token_ids, "int32")
        if num_rows == size:
            rows, _ = self._decode(
                self._begin(queue), _int32(0), _int32(size + 1), ends
            )
            return rows.answers, rows.log_probs

        return self._answer_queue(queue, num_rows, ends)

    def _answer_queue(
        self, queue: dict[str, Any], num_rows: int, ends: Any
    ) -> tuple[Any, Any]:
        """Answers a queue of more prompts than there are rows.

        Args:
            queue: As `Rows` has them.
            num_rows: Prompts that are answered at a time.
            ends: Ids that end an answer.

        Returns:
            Token ids and their log-probs, for each prompt.
        """
        size, prompt_time = queue["prompts"].shape
        num_prompts = ops.sum(ops.cast(queue["is_active"], "int32"))
        count = max(int(num_rows * SHARE_THAT_BEGINS), min(num_rows // 4, 4), 1)

        def begin(first: Any) -> Rows:
            """The next prompts; what is behind the last isn't active."""
            wanted = first + ops.arange(count, dtype="int32")
            places = _at_most(wanted, size - 1)
            taken = {n: ops.take(a, places, axis=0) for n, a in queue.items()}
            is_new = wanted < num_prompts
            taken["is_active"] = is_new
            taken["places"] = ops.where(is_new, places, size)
            return self._begin(taken)

        def go_on(
            first: Any, step: Any, rows: Rows, kept: tuple[Any, Any]
        ) -> tuple[Any, ...]:
            kept = _keep(rows, kept)
            # Rows that are over come first.
            order = ops.argsort(ops.cast(rows.is_active, "int32"))
            rows = tree.map_structure(
                lambda array, new: backend.write_rows(
                    array, order[:count], new
                ),
                rows,
                begin(first),
            )
            first = first + count
            # While others wait, until there is room for as many.
            enough = ops.where(
                first < num_prompts, _int32(count), _int32(num_rows + 1)
            )
            rows, step = self._decode(rows, step, enough, ends)
            return first, step, rows, kept

        # One more, for rows without a prompt.
        shape = (size + 1, self.max_new_tokens)
        *_, rows, kept = ops.while_loop(
            lambda first, *_: first < num_prompts,
            go_on,
            (
                _int32(0),
                _int32(0),
                self._no_rows(num_rows, size, prompt_time),
                (ops.zeros(shape, "int32"), ops.zeros(shape, "float32")),
            ),
        )
        answers, log_probs = _keep(rows, kept)
        return answers[:size], log_probs[:size]

    def _begin(self, prompts: dict[str, Any]) -> Rows:
        """Rows with prompts, of which nothing is answered yet."""
        num_rows, prompt_time = prompts["prompts"].shape
        total = prompt_time + self.max_new_tokens
        positions = self.forward.first_positions(prompts["lengths"])
        return self._no_answers(
            num_rows,
            **prompts,
            positions=positions,
            token_ids=_column(prompts["prompts"], positions),
            cache=self.forward.prefill(
                prompts["prompts"], prompts["lengths"], total
            ),
        )

    def _no_rows(self, num_rows: int, size: int, prompt_time: int) -> Rows:
        """Rows without prompts."""
        # A tensor each, as PyTorch writes to them.
        return self._no_answers(
            num_rows,
            places=ops.full((num_rows,), size, "int32"),
            prompts=ops.zeros((num_rows, prompt_time), "int32"),
            lengths=ops.ones((num_rows,), "int32"),
            noise=ops.zeros(
                (num_rows, NUMBERS * self.max_new_tokens), "float32"
            ),
            is_active=ops.zeros((num_rows,), "bool"),
            positions=ops.zeros((num_rows,), "int32"),
            token_ids=ops.zeros((num_rows,), "int32"),
            cache=self.forward.empty(
                num_rows, prompt_time + self.max_new_tokens
            ),
        )

    def _no_answers(self, num_rows: int, **fields: Any) -> Rows:
        shape = (num_rows, self.max_new_tokens)
        return Rows(
            answers=ops.full(shape, self.pad_token_id, "int32"),
            log_probs=ops.zeros(shape, "float32"),
            **fields,
        )

    def _decode(
        self, rows: Rows, step: Any, enough: Any, ends: Any
    ) -> tuple[Rows, Any]:
        """Draws tokens until all answers, or `enough` of them, are over.

        Args:
            rows: The batch.
            step: Tokens that were drawn for it before.
            enough: Number of rows.
            ends: Ids that end an answer.

        Returns:
            The batch, and `step` now.
        """
        numbers = ops.arange(self.max_new_tokens, dtype="int32")
        prompt_time = rows.prompts.shape[1]

        def goes_on(rows: Rows, step: Any) -> Any:
            del step
            num_over = ops.sum(ops.cast(~rows.is_active, "int32"))
            return ops.logical_and(ops.any(rows.is_active), num_over < enough)

        def draw_token(rows: Rows, step: Any) -> tuple[Rows, Any]:
            # A row has another column in each of its steps.
            column = prompt_time + step % self.max_new_tokens
            logits, cache = self.forward.step(
                rows.token_ids[:, None], rows.cache, rows.positions, column
            )
            positions = rows.positions + 1
            number = positions - rows.lengths  # of the new token
            drawn, log_probs = self._draw(logits, rows.noise, number)
            counts = ops.logical_and(rows.is_active, number >= 0)
            is_end = ops.any(drawn[:, None] == ends, axis=1)
            is_last = number + 1 >= self.max_new_tokens
            is_over = ops.logical_and(counts, ops.logical_or(is_end, is_last))
            is_new = ops.logical_and(
                number[:, None] == numbers, counts[:, None]
            )
            rows = rows._replace(
                cache=cache,
                positions=positions,
                token_ids=ops.where(
                    number < 0, _column(rows.prompts, positions), drawn
                ),
                answers=ops.where(is_new, drawn[:, None], rows.answers),
                log_probs=ops.where(is_new, log_probs[:, None], rows.log_probs),
                is_active=ops.logical_and(rows.is_active, ~is_over),
            )
            return rows, step + 1

        rows, step = ops.while_loop(goes_on, draw_token, (rows, step))
        return rows, step

    def _draw(self, logits: Any, noise: Any, number: Any) -> tuple[Any, Any]:
        """Ids and their log-probs, both of shape `(batch,)`.

        Args:
            logits: Tensor of shape `(batch, vocabulary)`.
            noise: Of the rows.
            number: Of the new tokens in their answers, of shape `(batch,)`.
        """
        logits = ops.cast(logits, "float32") / (self.temperature or 1.0)
        probabilities = ops.softmax(logits)
        if self.temperature:
            number = ops.maximum(number, ops.zeros_like(number))
            number = _at_most(number, self.max_new_tokens - 1)
            columns = NUMBERS * number[:, None]
            columns = columns + ops.arange(NUMBERS, dtype="int32")
            noise = ops.take_along_axis(noise, columns, axis=1)
            drawn = draw(probabilities, noise)
        else:
            drawn = ops.cast(ops.argmax(probabilities, axis=-1), "int32")
        return drawn, ops.log(_column(probabilities, drawn))


def _keep(rows: Rows, kept: tuple[Any, Any]) -> tuple[Any, Any]:
    """Answers and log-probs with those of the rows at their places."""
    places = rows.places[:, None]
    answers, log_probs = kept
    return (
        ops.scatter_update(answers, places, rows.answers),
        ops.scatter_update(log_probs, places, rows.log_probs),
    )


def _column(array: Any, index: Any) -> Any:
    """`array[i, index[i]]`, and the last column beyond it."""
    index = _at_most(index, array.shape[1] - 1)
    return ops.take_along_axis(array, index[:, None], axis=1)[:, 0]


def _at_most(index: Any, limit: int) -> Any:
    return ops.minimum(index, _int32(limit))


def _int32(number: int) -> Any:
    """A tensor; of plain numbers Keras (3.15) makes floats and other ints."""
    return ops.convert_to_tensor(number, "int32")
