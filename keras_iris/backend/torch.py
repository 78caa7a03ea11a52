"""The train step of `SelfPlayModel` on PyTorch."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import keras
import torch
import torch.utils.checkpoint

from keras_iris.backend.gradients import gradient_norm
from keras_iris.backend.refusals import (
    refuse_distribution,
    refuse_layer_losses,
)
from keras_iris.backend.routers import (
    has_routers,
    router_loss,
    router_sums,
    split_sums,
)
from keras_iris.backend.torch_graphs import Recorder, known_num_used
from keras_iris.backend.torch_processes import (
    add_up,
    gather,
    local_rows,
    process_count,
    process_index,
)
from keras_iris.data import PairDataset
from keras_iris.losses.stream import Stream, shares

# None for a variable that the loss doesn't depend on.
Gradients: TypeAlias = list[torch.Tensor | None]


def dataset(batches: PairDataset, *, is_training: bool = False) -> Any:
    """What Keras takes for batches: this process's share of each in `fit`."""
    return local_rows(batches) if is_training else batches


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor's products are made by the processor."""
    return tensor.is_cpu


def device_names() -> list[str]:
    """Names of the devices, for people to read."""
    numbers = range(torch.cuda.device_count())
    return [torch.cuda.get_device_name(n) for n in numbers] or ["cpu"]


def cache_compilations(folder: Path) -> None:
    """Does nothing: there is nothing compiled that a file could hold."""


def seed_step(seed: int) -> None:
    """Seeds PyTorch's own random numbers, which dropout is drawn from.

    Args:
        seed: Of the step.
    """
    torch.manual_seed(seed)


def prepare_remat() -> None:
    """Does nothing: rematerialised layers are right as they are."""


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """`keras.remat`, in a recording without the state of random numbers.

    That can't be read there.
    """
    return functools.partial(
        torch.utils.checkpoint.checkpoint,
        function,
        use_reentrant=False,
        preserve_rng_state=known_num_used() is None,
    )


def write(cache: torch.Tensor, index: Any, new: torch.Tensor) -> torch.Tensor:
    """A cache with new positions: see `keras_iris.backend.jax.write`."""
    cache[:, :, index : index + new.shape[2]] = new
    return cache


def write_rows(
    array: torch.Tensor, rows: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """An array with other rows: see `keras_iris.backend.jax.write_rows`."""
    groups = torch.arange(len(rows), device=rows.device)[:, None]
    array[groups, rows] = new
    return array


def map_parts(
    function: Callable[[Any], torch.Tensor], x: Any, size: int
) -> torch.Tensor:
    """A function of a batch's parts: see `keras_iris.backend.jax.map_parts`."""
    num_rows = len(keras.tree.flatten(x)[0])
    return torch.cat(
        [
            function(
                keras.tree.map_structure(lambda a, s=start: a[s : s + size], x)
            )
            for start in range(0, num_rows, size)
        ]
    )


class Trainer(keras.Model):
    """A `keras.Model` with the micro-batched train step.

    See `keras_iris.backend.jax.Trainer` for how it adds up gradients. On a GPU
    its passes are recorded as CUDA graphs, unless `run_eagerly` is set.
    """

    _recorder: Recorder | None = None

    def device_scope(self) -> contextlib.AbstractContextManager[None]:
        """Where the optimizer makes its variables: anywhere."""
        return contextlib.nullcontext()

    def check_devices(self) -> None:
        """Refuses what can't be trained in several processes."""
        refuse_distribution()
        size, count = self.micro_batch_size or 0, process_count()
        if size % count:
            raise ValueError(
                f"In {count} processes `micro_batch_size` has to be a multiple "
                f"of their number. Received: micro_batch_size={size}."
            )

    @functools.wraps(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102
        self._recorder = None  # what is compiled anew may compute otherwise
        super().compile(*args, **kwargs)

    @functools.wraps(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        try:
            return super().fit(*args, **kwargs)
        finally:
            # And with it its memory, which generation has use for.
            self._recorder = None

    def train_step(self, data: Any) -> dict[str, Any]:
        """One optimizer step, with the exact gradient of the whole batch.

        In several processes each has some of its rows.
        """
        if self._recorder is None:
            return self._step(data)
        with self._recorder.scope():
            return self._step(data)

    def _step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        num_rows = 0 if y is None else y.shape[0]  # without, the loss raises
        is_whole = (self.micro_batch_size or num_rows) >= num_rows
        variables = self.trainable_weights[:]
        if is_whole and process_count() == 1:
            whole = x, y, sample_weight
            self.zero_grad()
            y_pred = self._call(x)
            loss = self._batch_loss(whole, y_pred)
            self.optimizer.scale_loss(loss).backward()
            gradients: Gradients = [v.value.grad for v in variables]
        else:
            whole = self._gathered(x, y, sample_weight)
            loss, y_pred, gradients = self._gradients_of_parts(x, whole)
        x, y, sample_weight = whole
        self._loss_tracker.update_state(loss.detach(), sample_weight=y.shape[0])
        with torch.no_grad():
            self.recent.gradient_norm.assign(
                gradient_norm(gradients, self.optimizer.scale_loss)
            )
            self.optimizer.apply(gradients, variables)
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def _call(self, x: Any) -> torch.Tensor:
        """The model's log-probs in training; on a GPU by recorded passes."""
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
        is_recorded = x["token_ids"].is_cuda and not (
            self.run_eagerly or self.jit_compile or has_routers(self)
        )
        if not is_recorded:
            return self(x, training=True)
        if self._recorder is None:
            self._recorder = Recorder(self)
        return self._recorder(x)

    def _gathered(self, x: Any, y: Any, sample_weight: Any) -> Any:
        """What loss and metrics see of a batch, of all processes."""
        y = keras.ops.convert_to_tensor(y)
        if process_count() == 1:
            return x, y, sample_weight
        if sample_weight is not None:
            sample_weight = gather(keras.ops.convert_to_tensor(sample_weight))
        mask = keras.ops.convert_to_tensor(x["response_mask"])
        return {"response_mask": gather(mask)}, gather(y), sample_weight

    def _gradients_of_parts(
        self, x: Any, whole: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
        """Loss, log-probs and gradients of the batch of all processes."""
        if has_routers(self):
            loss, y_pred, gradients = self._two_passes(x, whole)
        else:
            y_pred, gradients = self._micro_batched_gradients(x, *whole[1:])
            loss = self._batch_loss(whole, y_pred)
        # What the loss depends on beside the log-probs: weight regularisers.
        if loss.requires_grad:
            direct = torch.autograd.grad(
                self.optimizer.scale_loss(loss),
                [v.value for v in self.trainable_weights],
                allow_unused=True,
            )
            gradients = _add(gradients, direct)
        return loss, y_pred, gradients

    def _batch_loss(self, batch: Any, y_pred: torch.Tensor) -> torch.Tensor:
        """The loss of a whole batch, and of what else there is."""
        x, y, sample_weight = batch
        # The hook of Keras' own step (3.15).
        return self._compute_loss(
            x=x,
            y=y,
            y_pred=y_pred,
            sample_weight=sample_weight,
            training=True,
        )

    def _two_passes(
        self, x: Any, batch: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Gradients]:
        """Loss, log-probs and gradients: see the one of JAX."""
        num_rows, count = len(x["token_ids"]), process_count()
        size = self._local_size(num_rows)
        starts = range(0, num_rows, size)

        def call(start: int) -> tuple[torch.Tensor, torch.Tensor]:
            rows = keras.tree.map_structure(
                lambda a: keras.ops.convert_to_tensor(a[start : start + size]),
                x,
            )
            row_weights = torch.ones_like(rows["token_ids"][..., 0]).float()
            with router_sums(self, row_weights):
                y_pred = self(rows, training=True)
            sums, others = split_sums(self.losses)
            refuse_layer_losses(self, others)
            self._clear_losses()
            return y_pred, sums

        # The second pass draws the same dropout.
        with torch.no_grad(), torch.random.fork_rng():
            outputs = [call(start) for start in starts]
        y_pred = gather(torch.cat([row[0] for row in outputs]))
        sums = torch.stack([row[1] for row in outputs]).sum(0)
        add_up([sums])
        y_pred.requires_grad_()
        sums.requires_grad_()
        loss = self._batch_loss(batch, y_pred)
        loss = loss + router_loss(sums, len(starts) * count)
        values = [variable.value for variable in self.trainable_weights]
        d_pred, d_sums, *direct = torch.autograd.grad(
            self.optimizer.scale_loss(loss),
            [y_pred, sums, *values],
            allow_unused=True,
        )
        first = process_index() * num_rows
        d_pred = d_pred[first : first + num_rows]
        gradients: Gradients = [None] * len(values)
        self.zero_grad()
        for start in starts:
            torch.autograd.backward(
                call(start), [d_pred[start : start + size], d_sums]
            )
            _take_gradients(values, gradients)
        add_up(gradients)
        self.zero_grad()
        return loss.detach(), y_pred.detach(), _add(gradients, direct)

    def _micro_batched_gradients(
        self, x: Any, y: torch.Tensor, sample_weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, Gradients]:
        """The log-probs and the (scaled) gradients of the whole batch.

        Args:
            x: The rows of this process.
            y: Of the whole batch.
            sample_weight: Likewise.
        """
        share = shares(sample_weight, y)
        num_rows = len(y) // process_count()
        first = process_index() * num_rows
        y, share = (a[first : first + num_rows] for a in (y, share))
        gradients: Gradients = [None] * len(self.trainable_weights)
        columns: dict[int, torch.Tensor] = {}
        for stream in self.loss.streams(y, x["token_ids"][..., 0]):
            y_pred, term = self._accumulate(stream, x, y, share)
            gradients = _add(term, gradients)
            columns |= dict(zip(stream.columns, y_pred.T, strict=True))
        y_pred = torch.stack([columns[i] for i in sorted(columns)], dim=1)
        return gather(y_pred), gradients

    def _local_size(self, num_rows: int) -> int:
        """Rows of a micro-batch in this process, which has `num_rows`."""
        size = self.micro_batch_size
        return size // process_count() if size else num_rows

    def _accumulate(
        self, stream: Stream, x: Any, y: torch.Tensor, share: torch.Tensor
    ) -> tuple[torch.Tensor, Gradients]:
        """The log-probs of a term's responses, and its gradients."""
        values = [variable.value for variable in self.trainable_weights]
        num_rows, count = y.shape[0], process_count()
        size = stream.part_size(self._local_size(num_rows), num_rows)
        read = list(stream.columns)
        shift = torch.full((), stream.first_shift, device=y.device)
        total = torch.zeros((), device=y.device)
        gradients: Gradients = [None] * len(values)
        predictions = []
        self.zero_grad()
        for start in range(0, num_rows, size):
            rows = slice(start, start + size)
            x_rows = keras.tree.map_structure(lambda a, r=rows: a[r, read], x)
            y_pred = self._call(x_rows)
            refuse_layer_losses(self)
            predictions.append(y_pred.detach())
            objective, part, new_shift = stream.objective(
                y[rows, read], y_pred, share[rows], shift
            )
            shrink = torch.exp(shift - new_shift)
            total = shrink * total + part
            shift = new_shift
            _multiply(gradients, shrink)
            self.optimizer.scale_loss(objective).backward()
            _take_gradients(values, gradients)
            # Nothing may hold on to these passes while others are recorded.
            del y_pred, objective
        if count > 1:
            # The sums of other processes count from other exponents.
            shrink = torch.exp(shift - gather(shift[None]).max())
            total *= shrink
            _multiply(gradients, shrink)
            add_up([total, *gradients])
        total = torch.where(total == 0, 1, total)
        self.zero_grad()
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                # Not in place: recorded passes add to the same tensors again.
                gradients[i] = gradient / total
        return torch.cat(predictions), gradients


def _multiply(gradients: Gradients, factor: torch.Tensor) -> None:
    """Multiplies gradients, in place."""
    for gradient in gradients:
        if gradient is not None:
            gradient *= factor


def _take_gradients(
    values: Sequence[torch.Tensor], gradients: Gradients
) -> None:
    """Adds what `backward` has given to `gradients`, in place."""
    for i, value in enumerate(values):
        if value.grad is None or value.grad is gradients[i]:
            continue  # which `backward` added to
        if value.dtype.itemsize > 2:
            gradients[i] = value.grad
            continue
        # Half-precision gradients are summed in float32.
        new, value.grad = value.grad.float(), None
        old = gradients[i]
        gradients[i] = new if old is None else old.add_(new)


def _add(
    gradients: Gradients, others: Sequence[torch.Tensor | None]
) -> Gradients:
    """Adds `others` to `gradients`, in place; None is no gradient."""
    return [
        g if o is None else o if g is None else g.add_(o)
        for g, o in zip(gradients, others, strict=True)
    ]
