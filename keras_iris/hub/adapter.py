"""Saving and loading what was trained, without the rest."""

from pathlib import Path

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from keras_iris.files import check_replaceable, replaced, written_beside
from keras_iris.hub.peft_layout import PEFT_FILES, read_peft, write_peft

_SUFFIX = ".safetensors"


def save_adapter(causal_lm: keras.Model, path: str | Path) -> Path:
    """Saves the trained variables.

    Args:
        causal_lm: A KerasHub causal LM.
        path: A file that ends in `.safetensors`, which gets all trainable
            variables by their paths; or a folder, which gets LoRA adapters
            in the layout of the `peft` library. A folder that isn't empty
            has to be an earlier adapter.

    Returns:
        The path.

    Raises:
        ValueError: If nothing is trainable, or PEFT's layout cannot hold what
            is.

    Example:
    ```python
    keras_iris.hub.save_adapter(causal_lm, "adapter.safetensors")
    causal_lm = keras_iris.load(preset, lora_rank=16)
    keras_iris.hub.load_adapter(causal_lm, "adapter.safetensors")
    ```
    """
    path = Path(path).expanduser().absolute()
    variables = _trainable(causal_lm)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == _SUFFIX:
        arrays = {name: _to_numpy(v) for name, v in variables.items()}
        with replaced(path) as new:
            save_file(arrays, new)
        return path
    check_replaceable(path, lambda names: names - set(PEFT_FILES))
    with written_beside(path) as folder:
        write_peft(causal_lm, folder)
    return path


def load_adapter(causal_lm: keras.Model, path: str | Path) -> None:
    """Loads what `save_adapter` saved.

    Of PEFT's adapters those can be read that KerasHub's LoRA can compute:
    plain LoRA (no rsLoRA, no DoRA) of just the query and value projections,
    of rank `heads * lora_rank`, with a second factor that is block-diagonal
    and the same for every head. In practice these are the ones from
    `save_adapter`. Merge another one with peft's `merge_and_unload`, save the
    model and load that.

    Args:
        causal_lm: A model with the same trainable variables: loaded from the
            same preset with the same `lora_rank`.
        path: The file or folder.

    Raises:
        ValueError: If it isn't an adapter, or one of another model. Then the
            model is unchanged.
    """
    path = Path(path).expanduser()
    variables = _trainable(causal_lm)
    if path.is_dir():
        arrays = read_peft(causal_lm, path)
    else:
        arrays = _read_file(path)
    _check(path, variables, arrays)
    for name, variable in variables.items():
        variable.assign(arrays[name])


def _to_numpy(variable: keras.Variable) -> np.ndarray:
    """A variable's value, contiguous and in its own type if NumPy has it."""
    return np.ascontiguousarray(ops.convert_to_numpy(variable))


def _trainable(causal_lm: keras.Model) -> dict[str, keras.Variable]:
    variables = {v.path: v for v in causal_lm.backbone.trainable_variables}
    if not variables:
        raise ValueError(
            "The model has no trainable variables. Load it with "
            "`lora_rank=16`, or unfreeze what you train."
        )
    return variables


def _read_file(path: Path) -> dict[str, np.ndarray]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read as a safetensors file: {error}. Expected "
            "a file or a folder from `keras_iris.hub.save_adapter`."
        ) from error


def _check(
    path: Path,
    variables: dict[str, keras.Variable],
    arrays: dict[str, np.ndarray],
) -> None:
    differing = sorted(set(variables) ^ set(arrays)) or [
        name
        for name, variable in variables.items()
        if tuple(variable.shape) != arrays[name].shape
    ]
    if differing:
        name = differing[0]
        there = arrays[name].shape if name in arrays else "nothing"
        here = tuple(variables[name].shape) if name in variables else "nothing"
        raise ValueError(
            f"{path} doesn't fit the model's trainable variables. First "
            f"difference of {len(differing)}: {name!r} is {there} in the "
            f"file and {here} in the model. Load the model with the preset "
            "and `lora_rank` that the adapter was trained with."
        )
