"""Which dimension of which variable is cut over which devices."""

import math
from typing import Any

import keras

from keras_iris.models.lora import LAYER_ROLES

DATA, MODEL = "data", "model"

# The output of these is cut along the batch only. Without, XLA may cut it
# along its features as the matrices are, and move it for every layer.
_PINNED_OUTPUT = r".*(transformer_layer|decoder_block)_\d+/output"
# Smaller variables are whole on every device.
_MIN_CUT_NUMBERS = 1024
# By columns are the matrices whose outputs are heads or feed-forward units,
# by rows those whose inputs are; so one sum over devices follows the pair.
_BY_COLUMNS = {"query", "key", "value", "gate", "up"}
_BY_ROWS = {"output", "down"}

# An axis for each dimension; the whole vocabulary takes both.
_BOTH = (DATA, MODEL)
_PLACES: dict[tuple[str, int], tuple[Any, ...]] = {
    ("columns", 2): (DATA, MODEL),  # (inputs, outputs)
    ("columns", 3): (DATA, MODEL, None),  # (inputs, heads, width)
    ("heads first", 3): (MODEL, DATA, None),  # (heads, inputs, width)
    ("rows", 2): (MODEL, DATA),
    ("rows", 3): (MODEL, None, DATA),  # (heads, width, outputs)
    ("experts", 3): (MODEL, DATA, None),  # (experts, inputs, outputs)
    ("lora_a of columns", 2): (DATA, None),
    ("lora_b of columns", 2): (None, MODEL),
    ("lora_a of rows", 2): (MODEL, None),
    ("lora_b of rows", 2): (None, DATA),
    ("embeddings", 2): (_BOTH, None),  # (vocabulary, width)
    ("reverse_embeddings", 2): (None, _BOTH),
}


class MultiAxisLayout(keras.distribution.TensorLayout):
    """A layout whose dimensions may be cut over several axes of the mesh."""

    def _validate_axes(self) -> None:
        """Keras (3.15) would look for the tuple among the axes' names."""


class ShardedParallel(keras.distribution.ModelParallel):
    """Cuts batches and variables over a mesh, for every decoder (FSDP or 2D).

    A matrix of a decoder block is cut as its role asks for, by columns or by
    rows; the embeddings along the vocabulary; LoRA's factors as their matrix.
    Where the devices don't divide that dimension, another is cut; where they
    divide none, the variable is whole on every device, which
    `sharding_report` tells. Other variables are cut along the largest
    dimension that the devices divide, and the optimizer's as theirs.

    KerasHub 0.32's own layout maps leave LoRA and untied output layers whole,
    fail where devices don't divide the heads, and there is none for Mistral.

    Args:
        device_mesh: With an axis `"data"` and perhaps `"model"`.
    """

    def __init__(self, device_mesh: keras.distribution.DeviceMesh) -> None:
        layouts = keras.distribution.LayoutMap(device_mesh)
        layouts[_PINNED_OUTPUT] = (DATA, None, None)
        super().__init__(
            layout_map=layouts, batch_dim_name=DATA, auto_shard_dataset=False
        )
        names, shape = device_mesh.axis_names, device_mesh.shape
        self._sizes = dict(zip(names, shape, strict=True))

    def get_variable_layout(self, variable: Any) -> Any:
        """The layout of a variable, which Keras asks for as it is made."""
        if getattr(variable, "_layout", None) is not None:
            return variable._layout  # of the weight that a slot belongs to
        axes = self.axes(variable)
        return MultiAxisLayout(axes, self.device_mesh)

    def axes(self, variable: keras.Variable) -> list[Any]:
        """The axis of each dimension, or several; None for a whole one."""
        shape = tuple(variable.shape)
        axes: list[Any] = [None] * len(shape)
        # What metrics keep is small, and read in every process.
        is_metric = variable.aggregation != "none"
        if len(shape) < 2 or math.prod(shape) < _MIN_CUT_NUMBERS or is_metric:
            return axes
        wanted = _PLACES.get((_kind(variable.path), len(shape)), ())
        missing = [] if wanted else [DATA]
        for i, names in enumerate(wanted):
            names = names if isinstance(names, tuple) else (names,)
            present = tuple(n for n in names if self._sizes.get(n, 1) > 1)
            if not present:
                continue
            if shape[i] % self._number(present) == 0:
                axes[i] = present if len(present) > 1 else present[0]
            elif names != _BOTH:
                # Logits of a table that is cut along its width would have to
                # be added up over devices.
                missing += present
        for name in missing:
            self._place(name, axes, shape)
        return axes

    def _place(
        self, name: str, axes: list[Any], shape: tuple[int, ...]
    ) -> None:
        """Cuts the largest dimension that is still whole, if one divides."""
        size = self._sizes.get(name, 1)
        free = [
            i
            for i, axis in enumerate(axes)
            if axis is None and shape[i] % size == 0
        ]
        if free and size > 1:
            axes[max(free, key=lambda i: shape[i])] = name

    def _number(self, names: tuple[str, ...]) -> int:
        return math.prod(self._sizes[name] for name in names)


def _kind(path: str) -> str:
    """What a variable is, by the names of its layer and of itself."""
    parts = path.split("/")
    layer, name = (["", ""] + parts)[-2:]
    if name in ("embeddings", "reverse_embeddings"):
        return name
    if layer.startswith("expert_"):
        return "experts"
    role = LAYER_ROLES.get(layer)
    if role in _BY_ROWS:
        order = "rows"
    elif role in _BY_COLUMNS:
        order = "columns"
    else:
        return ""
    if name in ("lora_a", "lora_b"):
        return f"{name} of {order}"
    is_gemma = any(part.startswith("decoder_block_") for part in parts)
    if order == "columns" and is_gemma:
        return "heads first" if role in ("query", "key", "value") else order
    return order
