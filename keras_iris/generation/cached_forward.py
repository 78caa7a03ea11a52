"""What generation asks of a forward pass with a cache."""

import abc
from typing import Any


class CachedForward(abc.ABC):
    """A forward pass with a cache.

    Attributes:
        is_rowwise: Whether each row has positions of its own, so that one can
            begin while others go on.

    Args:
        causal_lm: A `keras_hub.models.CausalLM`.
    """

    is_rowwise: bool

    def __init__(self, causal_lm: Any) -> None:
        self.causal_lm = causal_lm

    @abc.abstractmethod
    def empty(self, num_rows: int, total: int) -> Any:
        """A cache without tokens.

        Args:
            num_rows: The batch.
            total: Tokens of a row that the cache has room for.

        Returns:
            Tensors with the batch as their first axis, in a tuple.
        """

    @abc.abstractmethod
    def first_positions(self, lengths: Any) -> Any:
        """Positions of the tokens that the first `step` takes.

        Args:
            lengths: Tokens of the prompts, integers of shape `(batch,)`.

        Returns:
            Integer tensor of that shape.
        """

    @abc.abstractmethod
    def prefill(self, token_ids: Any, lengths: Any, total: int) -> Any:
        """The cache after the prompts, up to their first positions.

        Args:
            token_ids: Integer tensor of shape `(batch, time)`, prompts and the
                padding behind them.
            lengths: Tokens of the prompts, integers of shape `(batch,)`.
            total: As in `empty`.

        Returns:
            As `empty`.
        """

    @abc.abstractmethod
    def step(
        self, token_ids: Any, cache: Any, positions: Any, column: Any
    ) -> tuple[Any, Any]:
        """Logits of the tokens after those given.

        Args:
            token_ids: Integer tensor of shape `(batch, 1)`.
            cache: What `prefill` or the last `step` gave.
            positions: Of the tokens in their rows, of shape `(batch,)`.
            column: Where the cache has room for them, an integer scalar; a
                row's is another one in each step.

        Returns:
            Logits of shape `(batch, vocabulary)`, and the next cache.
        """
