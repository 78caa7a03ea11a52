"""The train step of `SelfPlayModel` on PyTorch."""

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch.utils.checkpoint import checkpoint

from keras_iris.data import PairDataset
from keras_iris.losses import Stream


def dataset(batches: PairDataset) -> PairDataset:
    """What `fit` takes for batches of several lengths: they themselves."""
    return batches


def seed_step(seed: int) -> None:
    """Seeds PyTorch's own random numbers, which dropout is drawn from.

    Args:
        seed: Of the step.
    """
    torch.manual_seed(seed)


def sum_chunks(
    function: Callable[..., torch.Tensor], arrays: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Sums `function(*chunk)` over the chunks, rematerialising each.

    Chunks whose last array, a mask, is all zero come last; they are skipped.

    Args:
        function: Maps one chunk of each array to a tensor, which has a
            gradient by the first array and by variables.
        arrays: Tensors of shape `(num_chunks, ...)`; the last is a mask.

    Returns:
        The sum, of the shape of one `function(*chunk)`.
    """
    mask = arrays[-1]
    used = mask.reshape(mask.shape[0], -1).any(dim=1).tolist()
    used[0] = True  # the sum of no chunks has no shape
    values = [
        checkpoint(function, *(a[i] for a in arrays), use_reentrant=False)
        for i, is_used in enumerate(used)
        if is_used
    ]
    return torch.stack(values).sum(dim=0)


def token_log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Log-probs of tokens, in nats.

    Args:
        logits: Float32 tensor of shape `(tokens, vocabulary)`.
        token_ids: Integer tensor of shape `(tokens,)`.

    Returns:
        Float32 tensor of shape `(tokens,)`.
    """
    return -torch.nn.functional.cross_entropy(
        logits, token_ids.long(), reduction="none"
    )


class Trainer(keras.Model):
    """A `keras.Model` with the micro-batched train step.

    See `keras_iris.backend.jax.Trainer` for how it adds up gradients.
    """

    def train_step(self, data: Any) -> dict[str, Any]:
        """One optimizer step, with the exact gradient of the whole batch."""
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        num_rows = 0 if y is None else y.shape[0]  # without, the loss raises
        if (self.micro_batch_size or num_rows) >= num_rows:
            return super().train_step(data)
        y = keras.ops.convert_to_tensor(y)
        if sample_weight is None:
            sample_weight = torch.ones(num_rows, device=y.device)
        sample_weight = keras.ops.convert_to_tensor(sample_weight)
        y_pred = self._accumulate_gradients(x, y, sample_weight)
        # `_compute_loss` is the hook of Keras' own step (3.15).
        loss = self._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )
        # What the loss depends on beside the log-probs: weight regularisers.
        if loss.requires_grad:
            self.optimizer.scale_loss(loss).backward()
        self._loss_tracker.update_state(loss.detach(), sample_weight=num_rows)
        variables = self.trainable_weights[:]
        with torch.no_grad():
            gradients = [v.value.grad for v in variables]
            self.optimizer.apply(gradients, variables)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _accumulate_gradients(
        self, x: Any, y: torch.Tensor, sample_weight: torch.Tensor
    ) -> torch.Tensor:
        """Leaves the batch's gradients in `.grad`; returns the log-probs."""
        total_weight = sample_weight.sum()
        share = sample_weight / torch.where(total_weight == 0, 1, total_weight)
        variables = [variable.value for variable in self.trainable_variables]
        sums: dict[torch.Tensor, torch.Tensor] = {}
        columns: dict[int, torch.Tensor] = {}
        for stream in self.loss.streams():
            self.zero_grad()
            y_pred, total = self._accumulate(stream, x, y, share)
            for variable in variables:
                if variable.grad is not None:
                    variable.grad /= torch.where(total == 0, 1, total)
                    if variable in sums:
                        variable.grad += sums[variable]
                    sums[variable] = variable.grad
            columns |= dict(zip(stream.columns, y_pred.T, strict=True))
        return torch.stack([columns[0], columns[1]], dim=1)

    def _accumulate(
        self, stream: Stream, x: Any, y: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leaves a term's sum of gradients in `.grad`.

        Returns:
            The log-probs, and the sum of weights that the gradients are to
            be divided by.
        """
        size = stream.part_size(self.micro_batch_size, y.shape[0])
        read = list(stream.columns)
        shift = torch.full((), stream.first_shift, device=y.device)
        total = torch.zeros((), device=y.device)
        predictions = []
        for start in range(0, y.shape[0], size):
            rows = slice(start, start + size)
            x_rows = keras.tree.map_structure(lambda a, r=rows: a[r, read], x)
            y_pred = self(x_rows, training=True)
            predictions.append(y_pred.detach())
            objective, part, new_shift = stream.objective(
                y[rows, read], y_pred, share[rows], shift
            )
            if start:
                shrink = torch.exp(shift - new_shift)
                total *= shrink
                for variable in self.trainable_variables:
                    if variable.value.grad is not None:
                        variable.value.grad *= shrink
            self.optimizer.scale_loss(objective).backward()
            total += part
            shift = new_shift
        return torch.cat(predictions), total
