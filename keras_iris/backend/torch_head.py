"""Log-probs of a language-model head on PyTorch."""

from collections.abc import Iterator
from typing import Any

import torch

from keras_iris.backend.head import HeadOptions


def head_log_probs(
    hidden: torch.Tensor,
    table: torch.Tensor,
    token_ids: torch.Tensor,
    num_used: torch.Tensor,
    options: HeadOptions,
) -> torch.Tensor:
    """Log-probs of tokens, from hidden states, without the logits of all.

    See `keras_iris.backend.jax_head.head_log_probs`.
    """
    # As shapes may change, only tokens in use are computed.
    num_used = int(num_used)
    log_probs = _LogProbs.apply(
        hidden[:num_used], table, token_ids[:num_used], options
    )
    unused = len(token_ids) - num_used
    return torch.nn.functional.pad(log_probs, (0, unused))


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        table: torch.Tensor,
        token_ids: torch.Tensor,
        options: HeadOptions,
    ) -> torch.Tensor:
        head = _Head(hidden, table, token_ids, options)
        needs_hidden, needs_table = ctx.needs_input_grad[:2]
        log_probs, normalizer, by_hidden = head.forward(
            with_gradient=needs_hidden and not needs_table
        )
        ctx.options = options
        if needs_table:
            ctx.save_for_backward(hidden, table, token_ids, normalizer)
        elif needs_hidden:
            ctx.save_for_backward(by_hidden)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        if not ctx.needs_input_grad[1]:
            (by_hidden,) = ctx.saved_tensors
            scaled = upstream[0][:, None] * by_hidden
            return scaled.to(by_hidden.dtype), None, None, None
        hidden, table, token_ids, normalizer = ctx.saved_tensors
        head = _Head(hidden, table, token_ids, ctx.options)
        return *head.backward(normalizer, upstream[0]), None, None


class _Head:
    """The loops over blocks of outputs."""

    def __init__(
        self,
        hidden: torch.Tensor,
        table: torch.Tensor,
        token_ids: torch.Tensor,
        options: HeadOptions,
    ) -> None:
        self.hidden = hidden
        self.table = table
        self.token_ids = token_ids.long()
        self.options = options

    def forward(
        self, *, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Log-probs, log-normalizers, and gradients by hidden states."""
        zeros = self.hidden.new_zeros(len(self.hidden), dtype=torch.float32)
        largest, total, chosen = zeros - torch.inf, zeros, zeros
        mean = zeros[:, None]  # of the outputs, in the end (tokens, width)
        for start, block in self._blocks():
            logits = self._logits(block)
            index, is_own = self._own(start, len(block))
            own = logits.gather(1, index[:, None])[:, 0]
            chosen = torch.where(is_own, own, chosen)
            new = torch.maximum(largest, logits.amax(dim=1))
            shrink, largest = torch.exp(largest - new), new
            slope = self.options.slope(logits) if with_gradient else None
            weights = logits.sub_(largest[:, None]).exp_()
            total = shrink * total + weights.sum(dim=1)
            if with_gradient:
                weights = weights if slope is None else weights * slope
                mean = shrink[:, None] * mean + weights.to(block.dtype) @ block
        normalizer = largest + total.log()
        if not with_gradient:
            return chosen - normalizer, normalizer, None
        by_hidden = self.table[self.token_ids].float()
        by_hidden = self.options.before_cap(by_hidden, chosen[:, None])
        by_hidden -= mean / total[:, None]
        by_hidden = by_hidden.to(self.hidden.dtype)
        return chosen - normalizer, normalizer, by_hidden

    def backward(
        self, normalizer: torch.Tensor, upstream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients by the hidden states and by the table."""
        by_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        by_table = torch.empty_like(self.table)
        for start, block in self._blocks():
            logits = self._logits(block)
            slope = self.options.slope(logits)
            by_logits = logits.sub_(normalizer[:, None]).exp_()
            by_logits *= -upstream[:, None]
            index, is_own = self._own(start, len(block))
            own = torch.where(is_own, upstream, 0)
            by_logits.scatter_add_(1, index[:, None], own[:, None])
            by_logits = by_logits if slope is None else by_logits * slope
            by_logits = by_logits.to(block.dtype)
            by_hidden += by_logits @ block
            by_table[start : start + len(block)] = by_logits.T @ self.hidden
        return by_hidden.to(self.hidden.dtype), by_table

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of outputs, and the first output of each."""
        size, _, _ = self.options.blocks(len(self.table))
        for start in range(0, len(self.table), size):
            block = self.table[start : start + size]
            yield start, block.to(self.hidden.dtype)

    def _logits(self, block: torch.Tensor) -> torch.Tensor:
        logits = (self.hidden @ block.T).float()
        cap = self.options.soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _own(self, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each token is in a block, and whether it is in there."""
        index = self.token_ids - start
        return index.clamp(0, size - 1), (index >= 0) & (index < size)
