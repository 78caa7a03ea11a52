"""Checkpoints whose arrays are cut over devices, by Orbax."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import keras

_ARRAYS, _METADATA = "arrays", "metadata"


class ShardedCheckpoints:
    """Writes and reads variables, each process what its devices hold.

    A checkpoint is a folder that is there whole or not at all. Values are
    copied from the devices before `save` returns, and written afterwards.
    """

    def __init__(self) -> None:
        from orbax import checkpoint

        self._args = checkpoint.args
        self._checkpointer = checkpoint.AsyncCheckpointer(
            checkpoint.CompositeCheckpointHandler()
        )

    def save(
        self,
        folder: Path,
        variables: Sequence[keras.Variable],
        metadata: dict[str, str],
    ) -> None:
        """Begins to write a checkpoint.

        Args:
            folder: One that all processes see; an old one of that name, of a
                run that has gone back since, is replaced.
            variables: Their values are taken.
            metadata: Kept beside them.
        """
        arrays = {f"{i:05d}": _sound(v.value) for i, v in enumerate(variables)}
        self._checkpointer.save(
            folder,
            args=self._args.Composite(
                **{
                    _ARRAYS: self._args.StandardSave(arrays),
                    _METADATA: self._args.JsonSave(metadata),
                }
            ),
            force=True,
        )

    def wait(self) -> None:
        """Waits until all is written."""
        self._checkpointer.wait_until_finished()

    def load(self, folder: Path, variables: Sequence[keras.Variable]) -> None:
        """Assigns a checkpoint's values, cut as the variables are.

        Args:
            folder: That `save` wrote, from any number of processes.
            variables: Of the same shapes.

        Raises:
            ValueError: It can't be read, or holds other shapes.
        """
        wanted = {
            f"{i:05d}": jax.ShapeDtypeStruct(
                v.value.shape, v.value.dtype, sharding=v.value.sharding
            )
            for i, v in enumerate(variables)
        }
        try:
            arrays: Any = self._checkpointer.restore(
                folder,
                args=self._args.Composite(
                    **{_ARRAYS: self._args.StandardRestore(wanted)}
                ),
            )[_ARRAYS]
        except Exception as error:  # Orbax raises nothing narrower
            raise ValueError(
                f"{folder} can't be read as a checkpoint of this model and "
                f"optimizer: {str(error)[:300]}"
            ) from error
        for number, variable in enumerate(variables):
            variable.assign(arrays[f"{number:05d}"])


def _sound(array: jax.Array) -> jax.Array:
    """An array whose shards JAX (0.10) can tell.

    It can't where a process has one device of the mesh and the array was put
    there from that device, as Keras does with what isn't cut.
    """
    try:
        array.addressable_shards  # noqa: B018 (raises)
    except ValueError:
        return array.copy()
    return array
