"""Passes through a model on PyTorch that a GPU repeats without Python.

Keras starts thousands of kernels a pass, and Python takes longer for it than a
GPU for the kernels. A CUDA graph holds them all and starts them at once.
"""

import contextlib
import contextvars
import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from keras_iris.backend.refusals import count_layer_losses

# Tokens of a batch that log-probs are made of, where this is known before.
_num_used: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "num_used", default=None
)
# A batch has one of so many numbers of them, each with graphs of its own.
_STEPS = 8

Inputs: TypeAlias = dict[str, torch.Tensor]
# Variables, and gradients that recorded passes add to.
Pairs: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]


def known_num_used() -> int | None:
    """Tokens from the first on that a recorded pass computes; else `None`."""
    return _num_used.get()


class Recorder:
    """Calls a model in training, from the second time on by CUDA graphs.

    There is a graph for each shape of its inputs. They take turns in the same
    memory, so a forward pass has to be followed by its backward pass before
    there is another. Where something can't be recorded, as what the processor
    has to know of the GPU, every call stays an ordinary one.

    Args:
        model: Called with tensors by name; gives log-probs.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._pool = torch.cuda.graph_pool_handle()
        self._fails = False
        self._begin()

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """What the model gives in training.

        Args:
            inputs: Tensors of a batch, `response_mask` among them.

        Raises:
            RuntimeError: Recording failed in a way that PyTorch doesn't
                recover from.
        """
        num_used = _round_up(inputs["response_mask"][..., 1:])
        key = num_used, *(tuple(tensor.shape) for tensor in inputs.values())
        if key in self._seen and key not in self._passes and not self._fails:
            self._record(key, inputs, num_used)
        self._seen.add(key)  # some shapes occur only once
        if key not in self._passes:
            return self._model(inputs, training=True)
        # What autograd has to see is made of something that has a gradient.
        device = inputs["token_ids"].device
        anchor = torch.zeros((), requires_grad=True, device=device)
        passes = self._passes[key]
        log_probs: torch.Tensor = _Replay.apply(anchor, passes, inputs)
        return log_probs

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """A step: what isn't recorded of it doesn't wait for what is."""
        if self._weights != self._read_weights():
            self._begin()
        return _NumbersOnGpu() if self._passes else contextlib.nullcontext()

    def _begin(self) -> None:
        """Forgets what was recorded with other tensors, or trains others."""
        self._seen: set[Hashable] = set()
        self._passes: dict[Hashable, _Passes] = {}
        self._weights = self._read_weights()
        values = [v.value for v in self._model.trainable_weights]
        self._gradients = _Gradients(values)

    def _read_weights(self) -> list[Any]:
        variables = self._model.variables
        return [(v.value.data_ptr(), v.trainable) for v in variables]

    def _record(self, key: Hashable, inputs: Inputs, num_used: int) -> None:
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        token = _num_used.set(num_used)
        try:
            with _NumbersOnGpu():
                passes = _Passes(self._model, inputs, self._gradients)
                passes.try_once()
                passes.record(self._pool)
        except _NotRecordableError as error:
            self._fails = True
            warnings.warn(
                "The model's passes can't be recorded as CUDA graphs, so "
                f"Python starts every operation: {error.__cause__}",
                stacklevel=2,
            )
        else:
            self._passes[key] = passes
        finally:
            _num_used.reset(token)


class _NotRecordableError(Exception):
    """The passes need the processor; nothing was recorded."""


class _Passes:
    """The forward and the backward pass of one shape."""

    def __init__(
        self, model: Any, inputs: Inputs, gradients: "_Gradients"
    ) -> None:
        self.model, self.inputs, self.gradients = model, inputs, gradients
        self.outputs: Any = None

    def try_once(self) -> None:
        """Calls both; what waits for the GPU raises an error.

        In a recording it would break more than that.
        """
        gc.collect()  # what holds on to earlier passes, and to their stream
        try:
            with self.gradients.detached():
                with _no_waits():
                    self._call()
                    self.upstream = torch.zeros_like(self.outputs)
                    self._backward()
                reached = self.gradients.reached()
            self.pairs = self.gradients.pairs(reached)
        except RuntimeError as error:
            raise _NotRecordableError from error
        finally:
            self.outputs = None

    def record(self, pool: Any) -> None:
        """Makes `forward` and `backward`.

        Args:
            pool: The memory of all graphs.
        """
        gc.collect()
        try:
            with self.gradients.detached():
                for value, own in self.pairs:
                    value.grad = own
                self.forward = _capture(self._call, pool)
                self.backward = _capture(self._backward, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                "The model's passes couldn't be recorded as CUDA graphs. "
                "Compile it with run_eagerly=True, in a new process. "
                f"Received: {error}"
            ) from error

    def _call(self) -> None:
        self.outputs = self.model(self.inputs, training=True)
        if count_layer_losses(self.model):
            raise RuntimeError("its layers add losses")

    def _backward(self) -> None:
        torch.autograd.backward(self.outputs, self.upstream)


class _Gradients:
    """One set of gradients, that backward passes of all shapes add to."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self._values = values
        self._own: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """Within, variables have the gradients that they get there."""
        others = [value.grad for value in self._values]
        for value in self._values:
            value.grad = None
        try:
            yield
        finally:
            for value, other in zip(self._values, others, strict=True):
                value.grad = other

    def reached(self) -> list[int]:
        """Which variables have a gradient; Keras leaves others alone."""
        return [i for i, v in enumerate(self._values) if v.grad is not None]

    def pairs(self, reached: Sequence[int]) -> Pairs:
        """Those variables, each with its gradient in this set."""
        for i in reached:
            if i not in self._own:
                self._own[i] = torch.zeros_like(self._values[i])
        return [(self._values[i], self._own[i]) for i in reached]


def _add(backward: Callable[[], None], pairs: Pairs) -> None:
    """Adds what a recorded pass gives to the variables' gradients."""
    fresh = [own for value, own in pairs if value.grad is not own]
    if fresh:
        torch._foreach_zero_(fresh)
    backward()
    for value, own in pairs:
        if value.grad is None:
            value.grad = own
        elif value.grad is not own:
            value.grad += own


class _Replay(torch.autograd.Function):
    """A recorded call, as autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, passes: _Passes, inputs: Inputs
    ) -> torch.Tensor:
        ctx.passes = passes
        for name, tensor in inputs.items():
            passes.inputs[name].copy_(tensor)
        passes.forward()
        return passes.outputs.detach().clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        ctx.passes.upstream.copy_(upstream[0])
        _add(ctx.passes.backward, ctx.passes.pairs)
        return None, None, None


class _NumbersOnGpu(torch.overrides.TorchFunctionMode):
    """Makes numbers where they are used: Keras copies them from the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls what PyTorch was asked for, or `full` instead."""
        kwargs = kwargs or {}
        is_number = args and type(args[0]) in (bool, int, float)
        if func is torch.as_tensor and is_number:
            try:
                return torch.full((), *args, **kwargs)
            except RuntimeError:  # of what is infinite in that dtype
                pass
        return func(*args, **kwargs)


def _round_up(mask: torch.Tensor) -> int:
    """Tokens in use, rounded up to one of a few numbers."""
    step = max(1, (1 << (mask.numel() - 1).bit_length()) // _STEPS)
    return min(mask.numel(), -(-int(mask.sum()) // step) * step)


@contextlib.contextmanager
def _no_waits() -> Iterator[None]:
    """What waits for the GPU raises a `RuntimeError`; on a stream apart."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(), torch.cuda.stream(stream):
            warnings.simplefilter("ignore")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
            yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(stream)


def _capture(function: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Calls a function, and gives one that repeats its kernels."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph.replay
