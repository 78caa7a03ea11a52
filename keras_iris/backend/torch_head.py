"""Log-probs of a language-model head on PyTorch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from keras_iris.backend.head import HeadOptions
from keras_iris.backend.torch_graphs import known_num_used


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
    known = known_num_used()
    num_used = int(num_used) if known is None else known
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
        chosen, normalizers, by_hidden = head.forward(
            with_gradient=needs_hidden and not needs_table
        )
        ctx.options = options
        if needs_table:
            ctx.save_for_backward(hidden, table, token_ids, chosen, normalizers)
        elif needs_hidden:
            ctx.save_for_backward(by_hidden)
        return chosen - normalizers.logsumexp(dim=0)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        if not ctx.needs_input_grad[1]:
            (by_hidden,) = ctx.saved_tensors
            scaled = upstream[0][:, None] * by_hidden
            return scaled.to(by_hidden.dtype), None, None, None
        hidden, table, token_ids, chosen, normalizers = ctx.saved_tensors
        head = _Head(hidden, table, token_ids, ctx.options)
        return *head.backward(chosen, normalizers, upstream[0]), None, None


class _Head:
    """The loops over blocks of outputs.

    A block has a softmax of its own: PyTorch makes one in a single pass. What
    scales it to that of all outputs multiplies the smaller factor of a product.
    A token's own output takes no part in the products: beside it, at a
    probability near 1, their rounding would be all that is left.
    """

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
        self.options = options.with_all_tokens(len(hidden))

    def forward(
        self, *, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Chosen logits, log-normalizers, and gradients by hidden states.

        The log-normalizers are of shape `(blocks, tokens)`.
        """
        chosen = self.hidden.new_zeros(len(self.hidden), dtype=torch.float32)
        total = chosen - torch.inf
        mean = chosen[:, None]  # of other outputs, in the end (tokens, width)
        normalizers = []
        for start, block in self._blocks():
            own, normalizer, block_mean = self._softmax(
                start, block, with_gradient
            )
            chosen = torch.where(self._is_in(start, block), own, chosen)
            normalizers.append(normalizer)
            if block_mean is not None:
                old, total = total, torch.logaddexp(total, normalizer)
                mean = torch.exp(old - total)[:, None] * mean
                share = torch.exp(normalizer - total)[:, None]
                mean = mean + share * block_mean
        by_hidden = None
        if with_gradient:
            own = self._by_own_logit(chosen, chosen - total)
            by_hidden = own[:, None] * self.table[self.token_ids] - mean
            by_hidden = by_hidden.to(self.hidden.dtype)
        return chosen, torch.stack(normalizers), by_hidden

    def backward(
        self,
        chosen: torch.Tensor,
        normalizers: torch.Tensor,
        upstream: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients by the hidden states and by the table."""
        by_hidden = torch.zeros_like(self.hidden, dtype=torch.float32)
        by_table = torch.empty_like(self.table)
        shares = normalizers.softmax(dim=0)  # of the blocks
        for share, (start, block) in zip(shares, self._blocks(), strict=True):
            scale = (-upstream * share)[:, None]
            by_states, by_block = self._block_gradients(start, block, scale)
            by_hidden += by_states
            by_table[start : start + len(block)] = by_block
        log_probs = chosen - normalizers.logsumexp(dim=0)
        own = (upstream * self._by_own_logit(chosen, log_probs))[:, None]
        by_hidden += own * self.table[self.token_ids]
        by_own = own * self.hidden
        if by_table.dtype == by_own.dtype:
            by_table.index_add_(0, self.token_ids, by_own)
        else:  # sums would be rounded again and again
            outputs, place = self.token_ids.unique(return_inverse=True)
            by_outputs = by_own.new_zeros(len(outputs), by_own.shape[1])
            by_outputs.index_add_(0, place, by_own)
            by_table[outputs] += by_outputs.to(by_table.dtype)
        return by_hidden.to(self.hidden.dtype), by_table

    # Tiles are gone before the next block: in functions of their own.

    def _softmax(
        self, start: int, block: torch.Tensor, with_mean: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Own logits, log-normalizers, and the mean of the other outputs."""
        logits = self._logits(block)
        own = logits.gather(1, self._index(start, block))[:, 0].float()
        log_softmax = logits.log_softmax(dim=1, dtype=torch.float32)
        # Of the largest logit, where the difference loses nothing.
        normalizer = logits.amax(dim=1) - log_softmax.amax(dim=1)
        if not with_mean:
            return own, normalizer, None
        weights = self._others(log_softmax.exp_(), logits, start, block)
        return own, normalizer, weights @ block

    def _block_gradients(
        self, start: int, block: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the log-normalizer times `scale`, but for the own outputs'."""
        logits = self._logits(block)
        weights = self._others(logits.softmax(dim=1), logits, start, block)
        scaled = (scale * self.hidden).to(block.dtype)
        return scale * (weights @ block), weights.T @ scaled

    def _others(
        self,
        softmax: torch.Tensor,
        logits: torch.Tensor,
        start: int,
        block: torch.Tensor,
    ) -> torch.Tensor:
        """What products take of a softmax, which is overwritten."""
        index, is_own = self._index(start, block), self._is_in(start, block)
        own = softmax.gather(1, index).masked_fill(is_own[:, None], 0)
        softmax.scatter_(1, index, own)
        return self.options.before_cap(softmax, logits).to(block.dtype)

    def _by_own_logit(
        self, chosen: torch.Tensor, log_probs: torch.Tensor
    ) -> torch.Tensor:
        """Derivatives of log-probs by the logits of the tokens themselves."""
        return self.options.before_cap(-torch.expm1(log_probs), chosen)

    def _index(self, start: int, block: torch.Tensor) -> torch.Tensor:
        """Where in a block tokens are, of shape `(tokens, 1)`; or anything."""
        return (self.token_ids - start).clamp(0, len(block) - 1)[:, None]

    def _is_in(self, start: int, block: torch.Tensor) -> torch.Tensor:
        """Which tokens are in a block."""
        index = self.token_ids - start
        return (index >= 0) & (index < len(block))

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of outputs, and the first output of each."""
        size, _, _ = self.options.blocks(len(self.table))
        for start in range(0, len(self.table), size):
            block = self.table[start : start + size]
            yield start, block.to(self.hidden.dtype)

    def _logits(self, block: torch.Tensor) -> torch.Tensor:
        logits = self.hidden @ block.T
        cap = self.options.soft_cap
        return logits if cap is None else cap * torch.tanh(logits.float() / cap)
