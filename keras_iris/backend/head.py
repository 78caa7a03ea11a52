"""What the backends' language-model heads have in common."""

import dataclasses
from typing import Any

# Of a tile with all tokens: 1 GiB of float32, or 8192 outputs if that is more.
_MOST_LOGITS = 2**28
_FEWEST_OUTPUTS = 8192


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

    def with_all_tokens(self, num_tokens: int) -> "HeadOptions":
        """The same options for tiles of all tokens.

        Of many tokens a tile has fewer outputs.
        """
        most = max(_FEWEST_OUTPUTS, _MOST_LOGITS // max(1, num_tokens))
        return dataclasses.replace(
            self,
            tile_tokens=num_tokens,
            tile_outputs=min(self.tile_outputs, most),
        )

    def blocks(self, num_outputs: int) -> tuple[int, int, int]:
        """Size and number of equal blocks, and of outputs left behind them."""
        fewest = -(-num_outputs // self.tile_outputs)
        # Rather some more blocks than a rest; and best of a multiple of 8, as
        # GPUs are slow at other sizes.
        sizes = [
            num_outputs // number
            for number in range(fewest, 2 * fewest)
            if num_outputs % number == 0
        ]
        aligned = [size for size in sizes if size % 8 == 0]
        rounded = 8 * -(-num_outputs // (8 * fewest))
        size = (aligned or sizes or [min(rounded, num_outputs)])[0]
        return size, num_outputs // size, num_outputs % size

    def before_cap(self, gradient: Any, logits: Any) -> Any:
        """A gradient by capped logits as one by the products.

        Args:
            gradient: Tensor of any backend.
            logits: Likewise, capped.
        """
        cap = self.soft_cap
        return gradient if cap is None else gradient * (1 - (logits / cap) ** 2)
