"""The train step of `SelfPlayModel` on PyTorch."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import torch
from torch.utils.checkpoint import checkpoint

from keras_iris.data import PairDataset


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

    See `keras_iris.backend.jax.Trainer` for the two passes.
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
        self.zero_grad()
        y_pred = self._accumulate_gradients(x, y, sample_weight)
        # What the loss depends on beside the log-probs: weight regularisers.
        loss = self._batch_loss(x, y, y_pred, sample_weight)
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
        """Adds the batch's gradients to `.grad`; returns the log-probs."""
        slices = list(_slices(y.shape[0], self.micro_batch_size))
        coefficients = None
        if not self.loss.is_additive:
            coefficients = self._coefficients(x, y, sample_weight, slices)
        total_weight = sample_weight.sum()
        predictions = []
        for rows in slices:
            y_pred = self(_rows(x, rows), training=True)
            if coefficients is not None:
                objective = (coefficients[rows] * y_pred).sum()
            else:
                weights = sample_weight[rows]
                share = weights.sum() / total_weight
                loss = self.loss(y[rows], y_pred, weights) * share
                objective = self.optimizer.scale_loss(loss)
            objective.backward()
            predictions.append(y_pred.detach())
        return torch.cat(predictions)

    def _coefficients(
        self,
        x: Any,
        y: torch.Tensor,
        sample_weight: torch.Tensor,
        slices: list[slice],
    ) -> torch.Tensor:
        """The (scaled) dL/dlog p of the whole batch, from a forward pass."""
        # Both passes have to draw the same dropout masks: from seeds that are
        # variables, or from PyTorch's own random numbers.
        states = [(v, v.value.clone()) for v in self.non_trainable_variables]
        devices = [y.device] if y.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            y_pred = torch.cat(
                [self(_rows(x, rows), training=True) for rows in slices]
            )
            for variable, value in states:
                variable.assign(value)
        y_pred.requires_grad_()
        loss = self._batch_loss(x, y, y_pred, sample_weight)
        scaled = self.optimizer.scale_loss(loss)
        return torch.autograd.grad(scaled, y_pred)[0]

    def _batch_loss(
        self,
        x: Any,
        y: torch.Tensor,
        y_pred: torch.Tensor,
        sample_weight: torch.Tensor,
    ) -> torch.Tensor:
        # `_compute_loss` is the hook of Keras' own step (3.15).
        return self._compute_loss(
            x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True
        )


def _slices(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _rows(x: Any, rows: slice) -> Any:
    return keras.tree.map_structure(lambda tensor: tensor[rows], x)
