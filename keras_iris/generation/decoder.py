"""Answers to a queue of prompts, compiled by KerasHub's machinery."""

from typing import Any, NamedTuple

import keras_hub
import numpy as np
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
    over, the next prompts get their rows, all in one compiled program. Where a
    batch is cut over devices, each has a queue for its own rows.

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
        return WAVES if self.forward.is_rowwise else 1

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
        shares = backend.num_row_shares()
        dealt = {n: _deal(array, shares) for n, array in inputs.items()}
        outputs = generate(
            {name: backend.cut(array) for name, array in dealt.items()},
            stop_token_ids=self.end_token_ids,
        )
        size = len(inputs["lengths"])
        answers, log_probs = (
            _deal(backend.read(output), size // shares) for output in outputs
        )
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
        ends = ops.convert_to_tensor(stop_token_ids, "int32")
        if num_rows == size:
            queue["places"] = ops.arange(size, dtype="int32")
            rows, _ = self._decode(
                self._begin(queue), _int32(0), _int32(size + 1), ends
            )
            return rows.answers, rows.log_probs

        shares = backend.num_row_shares()
        queues = {name: _cut(array, shares) for name, array in queue.items()}
        return self._answer_queues(queues, num_rows // shares, ends)

    def _answer_queues(
        self, queues: dict[str, Any], num_rows: int, ends: Any
    ) -> tuple[Any, Any]:
        """Answers queues of more prompts than there are rows.

        Every queue has rows of its own. They go on together, but no row waits
        for one of another queue unless that has none to begin with.

        Args:
            queues: As `Rows` has them, of shape `(queues, size, ...)`.
            num_rows: Prompts of a queue that are answered at a time.
            ends: Ids that end an answer.

        Returns:
            Token ids and their log-probs, for each prompt.
        """
        shares, size, prompt_time = queues["prompts"].shape
        is_active = ops.cast(queues["is_active"], "int32")
        num_prompts = ops.max(ops.sum(is_active, axis=1))
        count = max(int(num_rows * SHARE_THAT_BEGINS), min(num_rows // 4, 4), 1)
        numbers = ops.arange(num_rows, dtype="int32")[None]

        def begin(first: Any) -> Rows:
            """The next prompts; what is behind the last isn't active."""
            wanted = first + ops.arange(count, dtype="int32")
            places = _at_most(wanted, size - 1)
            taken = {n: ops.take(a, places, axis=1) for n, a in queues.items()}
            is_new = ops.logical_and(wanted < size, taken["is_active"])
            taken["is_active"] = is_new
            taken["places"] = ops.where(is_new, places, size)
            return self._begin({n: _join(a) for n, a in taken.items()})

        def go_on(
            first: Any, step: Any, rows: Rows, kept: tuple[Any, Any]
        ) -> tuple[Any, ...]:
            kept = keep(rows, kept)
            # Rows that are over come first.
            is_active = ops.cast(_cut(rows.is_active, shares), "int32")
            order = ops.argsort(is_active, axis=1)[:, :count]

            def replace(array: Any, new: Any) -> Any:
                array, new = _cut(array, shares), _cut(new, shares)
                return _join(backend.write_rows(array, order, new))

            rows = tree.map_structure(replace, rows, begin(first))
            rows = _on_devices(rows)
            first = first + count
            # While others wait, until there is room for as many.
            enough = ops.where(
                first < num_prompts, _int32(count), _int32(num_rows + 1)
            )
            rows, step = self._decode(rows, step, enough, ends)
            return first, step, rows, kept

        def keep(rows: Rows, kept: tuple[Any, Any]) -> tuple[Any, Any]:
            """Answers and log-probs with those of the rows at their places."""
            places = _cut(rows.places, shares)
            # Of rows without a prompt each has one behind them all.
            places = ops.where(places < size, places, size + numbers)
            answers, log_probs = (
                backend.write_rows(old, places, _cut(new, shares))
                for old, new in zip(
                    kept, (rows.answers, rows.log_probs), strict=True
                )
            )
            return answers, log_probs

        shape = (shares, size + num_rows, self.max_new_tokens)
        *_, rows, kept = ops.while_loop(
            lambda first, *_: first < num_prompts,
            go_on,
            (
                _int32(0),
                _int32(0),
                self._no_rows(shares * num_rows, size, prompt_time),
                (ops.zeros(shape, "int32"), ops.zeros(shape, "float32")),
            ),
        )
        answers, log_probs = keep(rows, kept)
        return _join(answers[:, :size]), _join(log_probs[:, :size])

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
        rows = Rows(
            answers=ops.full(shape, self.pad_token_id, "int32"),
            log_probs=ops.zeros(shape, "float32"),
            **fields,
        )
        return _on_devices(rows)

    def _decode(
        self, rows: Rows, step: Any, enough: Any, ends: Any
    ) -> tuple[Rows, Any]:
        """Draws tokens until all answers, or enough of them, are over.

        Args:
            rows: The batch.
            step: Tokens that were drawn for it before.
            enough: Number of rows of every device.
            ends: Ids that end an answer.

        Returns:
            The batch, and `step` now.
        """
        numbers = ops.arange(self.max_new_tokens, dtype="int32")
        prompt_time = rows.prompts.shape[1]

        def goes_on(rows: Rows, step: Any) -> Any:
            del step
            is_over = _cut(~rows.is_active, backend.num_row_shares())
            num_over = ops.min(ops.sum(ops.cast(is_over, "int32"), axis=1))
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
            return _on_devices(rows), step + 1

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


def _deal(array: np.ndarray, shares: int) -> np.ndarray:
    """Gives rows to so many shares in turn; those of a share are together."""
    grouped = array.reshape(-1, shares, *array.shape[1:])
    return grouped.swapaxes(0, 1).reshape(array.shape)


def _on_devices(rows: Rows) -> Rows:
    """The same, cut over devices: the compiler may choose to cut weights."""
    cut: Rows = tree.map_structure(backend.cut, rows)
    return cut


def _cut(array: Any, shares: int) -> Any:
    """Rows as `(shares, rows, ...)`: where devices have them, in place."""
    return ops.reshape(array, (shares, -1, *array.shape[1:]))


def _join(array: Any) -> Any:
    """Undoes `_cut`."""
    return ops.reshape(array, (-1, *array.shape[2:]))


def _column(array: Any, index: Any) -> Any:
    """`array[i, index[i]]`, and the last column beyond it."""
    index = _at_most(index, array.shape[1] - 1)
    return ops.take_along_axis(array, index[:, None], axis=1)[:, 0]


def _at_most(index: Any, limit: int) -> Any:
    return ops.minimum(index, _int32(limit))


def _int32(number: int) -> Any:
    """A tensor; of plain numbers Keras (3.15) makes floats and other ints."""
    return ops.convert_to_tensor(number, "int32")
