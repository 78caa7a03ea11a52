"""What the backends' language-model heads have in common."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """How log-probs are made of hidden states and a table of outputs.

    Args:
        tile_tokens: Tokens whose logits are held at a time.
        tile_outputs: Outputs whose logits are held at a time.
        soft_cap: Logits `l` become `soft_cap * tanh(l / soft_cap)`; `None`
            leaves them.
        is_trained: Whether the table gets a gradient.
    """

    tile_tokens: int
    tile_outputs: int
    soft_cap: float | None
    is_trained: bool

    def blocks(self, num_outputs: int) -> tuple[int, int, int]:
        """Size and number of equal blocks, and of outputs left behind them."""
        fewest = -(-num_outputs // self.tile_outputs)
        # Rather some more blocks than a rest.
        candidates = range(fewest, 2 * fewest)
        number = next((n for n in candidates if num_outputs % n == 0), fewest)
        size = -(-num_outputs // number)
        return size, num_outputs // size, num_outputs % size

    def slope(self, logits: Any) -> Any:
        """The derivative of capped logits by the products; `None` if it is 1.

        Args:
            logits: Tensor of any backend, capped.
        """
        cap = self.soft_cap
        return None if cap is None else 1 - (logits / cap) ** 2

    def before_cap(self, gradient: Any, logits: Any) -> Any:
        """A gradient by capped logits as one by the products."""
        slope = self.slope(logits)
        return gradient if slope is None else gradient * slope
