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
        mean = chosen[:, None]  # of the outputs, in the end (tokens, width)
        normalizers = []
        for start, block in self._blocks():
            index = self.token_ids - start
            own, normalizer, block_mean = self._softmax(
                block, index.clamp(0, len(block) - 1), with_gradient
            )
            is_own = (index >= 0) & (index < len(block))
            chosen = torch.where(is_own, own, chosen)
            normalizers.append(normalizer)
            if block_mean is not None:
                old, total = total, torch.logaddexp(total, normalizer)
                mean = torch.exp(old - total)[:, None] * mean
                share = torch.exp(normalizer - total)[:, None]
                mean = mean + share * block_mean
        by_hidden = None
        if with_gradient:
            by_hidden = self.table[self.token_ids].float()
            by_hidden = self.options.before_cap(by_hidden, chosen[:, None])
            by_hidden = (by_hidden - mean).to(self.hidden.dtype)
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
            by_states, by_block = self._block_gradients(block, scale)
            by_hidden += by_states
            by_table[start : start + len(block)] = by_block
        # Those by the logits of the tokens themselves.
        own = self.options.before_cap(upstream, chosen)[:, None]
        by_hidden += own * self.table[self.token_ids]
        outputs, place = self.token_ids.unique(return_inverse=True)
        by_outputs = by_hidden.new_zeros(len(outputs), self.hidden.shape[1])
        by_outputs.index_add_(0, place, own * self.hidden)
        by_table[outputs] += by_outputs.to(by_table.dtype)
        return by_hidden.to(self.hidden.dtype), by_table

    # Tiles are gone before the next block: in functions of their own.

    def _softmax(
        self, block: torch.Tensor, index: torch.Tensor, with_mean: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Logits at `index`, log-normalizers, and the mean of the outputs."""
        logits = self._logits(block)
        own = logits.gather(1, index[:, None])[:, 0].float()
        log_softmax = logits.log_softmax(dim=1, dtype=torch.float32)
        normalizer = logits[:, 0] - log_softmax[:, 0]
        if not with_mean:
            return own, normalizer, None
        weights = self.options.before_cap(log_softmax.exp_(), logits)
        return own, normalizer, weights.to(block.dtype) @ block

    def _block_gradients(
        self, block: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the log-normalizer times `scale`, by hidden states and block."""
        logits = self._logits(block)
        weights = self.options.before_cap(logits.softmax(dim=1), logits)
        weights = weights.to(block.dtype)
        scaled = (scale * self.hidden).to(block.dtype)
        return scale * (weights @ block), weights.T @ scaled

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
