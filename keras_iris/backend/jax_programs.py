"""Compiles a step for all lengths of its batches side by side."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

# A pytree of arrays.
Tree = Any


class SideBySide:
    """A step that is compiled ahead for the lengths that come.

    It would be compiled for one after another, each when a batch of that
    length comes, and the compiler has no work for all cores most of the time.
    JAX keeps what is compiled ahead for the calls.

    Args:
        step: Made by `jax.jit`, of a state and a batch.
        take_coming: Gives the lengths of the batches that come, in tokens, and
            whether to print them; nothing when it is called again.
    """

    def __init__(
        self, step: Any, take_coming: Callable[[], tuple[Collection[int], bool]]
    ) -> None:
        self._step = step
        self._take_coming = take_coming
        self._known: set[int] = set()

    def __call__(self, state: Tree, data: Tree) -> Tree:
        """What the step gives."""
        lengths, is_told = self._take_coming()
        new = sorted(set(lengths) - self._known)
        self._known.update(new)
        if len(new) > 1:
            if is_told:
                print("Compiling for sequences of", *new, "tokens")
            self._compile(state, data, new)
        return self._step(state, data)

    def _compile(self, state: Tree, data: Tree, lengths: list[int]) -> None:
        traced = [
            self._step.lower(
                state, jax.tree.map(lambda a, n=n: _with_length(a, n), data)
            )
            for n in lengths
        ]
        # Several processes may have to compile the same at a time.
        num_threads = len(traced) if jax.process_count() == 1 else 1
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda program: program.compile(), traced))


def _with_length(array: Any, length: int) -> Any:
    """The type of an array; inputs, of three axes, have another length."""
    shape = (*array.shape[:2], length) if array.ndim == 3 else array.shape
    is_placed = isinstance(array, jax.Array) and array.committed
    sharding = array.sharding if is_placed else None
    return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
