"""A Keras model on JAX whose values outlive interrupts."""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_iris.arguments import check_shared
from keras_iris.backend.jax_processes import num_batch_shares, replicate
from keras_iris.backend.jax_programs import SideBySide
from keras_iris.backend.local_rows import LocalRows
from keras_iris.data import PairDataset

# A pytree of arrays.
Tree = Any


def _keep_state(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an interrupt leave the variables as they were.

    Keras (3.15) takes their values out and hands them to the compiled step.
    """

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_values()
        options = inspect.signature(method).bind(self, *args, **kwargs)
        options.apply_defaults()
        _check_rows(**options.arguments)
        x = options.arguments["x"]
        self._whole_batch_size = getattr(x, "whole_batch_size", None)
        lengths = getattr(x, "sequence_lengths", ())
        self._coming = lengths, bool(options.arguments.get("verbose", 0))
        try:
            return method(self, *args, **kwargs)
        finally:
            self.jax_state_sync()
            self._jax_state = None
            self._unshare_values()

    return wrapper


class SafeModel(keras.Model):
    """A `keras.Model` that an interrupt leaves whole, or else says so."""

    _coming: tuple[Collection[int], bool] = (), False

    fit = _keep_state(keras.Model.fit)
    evaluate = _keep_state(keras.Model.evaluate)
    predict = _keep_state(keras.Model.predict)
    train_on_batch = _keep_state(keras.Model.train_on_batch)
    test_on_batch = _keep_state(keras.Model.test_on_batch)
    predict_on_batch = _keep_state(keras.Model.predict_on_batch)

    def _make_function(self, step_function: Any, *args: Any, **kw: Any) -> Any:
        """Keras' own (3.15), of a step that is compiled for all lengths."""
        if hasattr(step_function, "lower"):
            step_function = SideBySide(step_function, self._take_coming)
        return super()._make_function(step_function, *args, **kw)

    def _take_coming(self) -> tuple[Collection[int], bool]:
        """For the first step; `fit` may evaluate in between."""
        coming, self._coming = self._coming, ((), False)
        return coming

    def check_whole(self, num_rows: int) -> None:
        """Refuses a batch that isn't that of all processes.

        Args:
            num_rows: Of the batch that a step is traced with.
        """
        whole = getattr(self, "_whole_batch_size", None)
        if whole not in (None, num_rows):
            raise ValueError(
                f"The step is traced with {num_rows} rows, the batch of all "
                f"processes has {whole}. Pass the same `PairDataset` in every "
                "process."
            )

    def predict_step(self, state: Tree, data: Tree) -> tuple[Tree, Tree]:
        """Keras' own; every process has the predictions of all."""
        outputs, rest = super().predict_step(state, data)
        return replicate(outputs), rest

    def _get_jax_state(
        self, purge_model_variables: bool = False, **is_taken: bool
    ) -> tuple[Tree, ...]:
        """Keras' own (3.15), which has no public name.

        What is handed out is kept until the step gives the next state.
        """
        state = super()._get_jax_state(**is_taken)
        names = [name for name, is_in in is_taken.items() if is_in]
        self._jax_state: Tree = dict(zip(names, state, strict=True))
        self._jax_state_synced = False
        if purge_model_variables:
            self._purge_model_variables(**is_taken)
        return state

    def jax_state_sync(self) -> None:
        """Puts the values back into the variables, if the step left any."""
        if _is_gone(getattr(self, "_jax_state", None)):
            self._jax_state = None
        super().jax_state_sync()

    def _unshare_values(self) -> None:
        """Gives each variable memory of its own.

        Moving averages that became the weights have theirs, and a step that
        JAX gives the one's memory to would take the other's, too.
        """
        seen: set[int] = set()
        for variable in self._all_variables():
            if id(variable._value) in seen:
                variable.assign(jnp.copy(variable._value))
            seen.add(id(variable._value))

    def _all_variables(self) -> list[keras.Variable]:
        optimizer = self.optimizer if self.compiled else None
        return self.variables + (optimizer.variables if optimizer else [])

    def _check_values(self) -> None:
        """Refuses a model whose weights an interrupted step has taken."""
        values = [variable._value for variable in self._all_variables()]
        if any(value is None for value in values) or _is_gone(values):
            raise RuntimeError(
                "The model's weights are gone: an interrupt or an error in "
                "the middle of a step, which JAX gives their memory to, took "
                "them. Load the model, or its checkpoint, again."
            )


def _check_rows(x: Tree, batch_size: int | None = 0, **others: Any) -> None:
    """Refuses batches that the devices of a distribution don't divide.

    Args:
        x: The inputs.
        batch_size: Its size, None for Keras' own, 0 where `x` is a batch.
        **others: Other arguments of `fit` and the like.
    """
    num_devices = num_batch_shares()
    if isinstance(x, LocalRows):
        sizes = {x.whole_batch_size}
    elif jax.process_count() > 1:
        raise ValueError(
            "In several processes `x` has to be a `keras_iris.data.PairDataset`"
            f", the same in each. Received: {type(x).__name__}"
        )
    elif isinstance(x, PairDataset):
        sizes = {x.batch_size}
    else:
        arrays = [a for a in jax.tree.leaves(x) if hasattr(a, "shape")]
        num_rows = arrays[0].shape[0] if arrays else 0
        size = num_rows if batch_size == 0 else batch_size or 32
        sizes = {min(size, num_rows), num_rows % size if size else 0}
    for size in sorted(sizes):
        check_shared("the rows of every batch, the last too", size, num_devices)


def _is_gone(values: Tree) -> bool:
    """Whether a step has taken an array's memory."""
    arrays = [a for a in jax.tree.leaves(values) if isinstance(a, jax.Array)]
    return any(array.is_deleted() for array in arrays)
