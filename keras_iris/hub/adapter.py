"""LoRA adapters in the layout of the `peft` library."""

import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from keras_iris import backend
from keras_iris.data.text_files import read_json
from keras_iris.files import check_replaceable, written_beside
from keras_iris.hub.architectures import read_config
from keras_iris.hub.weights import Weight, list_weights
from keras_iris.models.lora import (
    Lora,
    LoraLayer,
    add_lora,
    find_lora,
    lora_layers,
    role_of,
)

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Of adapter_config.json: read here, told by the weights' names, or without
# influence on what a finished adapter computes.
_KNOWN = frozenset(
    """
    auto_mapping base_model_name_or_path ensure_weight_tying exclude_modules
    inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout
    megatron_core peft_type peft_version qalora_group_size r revision
    runtime_config target_modules task_type use_rslora
    """.split()
)
# Values of other entries that change nothing.
_NEUTRAL: tuple[Any, ...] = (None, False, {}, [], "none")
# Ways to draw the first factors that leave the model's own weights alone.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def save_adapter(causal_lm: keras.Model, folder: str | Path) -> Path:
    """Saves a model's LoRA adapters as `peft` does.

    Args:
        causal_lm: A model from `keras_iris.load(..., lora_rank=...)`.
        folder: The folder to write. If there is one already it has to be
            empty, or an earlier adapter, which is replaced.

    Returns:
        The folder, which peft, vLLM and llama.cpp's converter open.

    Raises:
        ValueError: As `check_adapter`, or `folder` holds something else.

    Examples:
        ```python
        causal_lm = keras_iris.load(preset, lora_rank=16)
        keras_iris.hub.save_adapter(causal_lm, "adapter")
        again = keras_iris.load(preset)
        keras_iris.hub.load_adapter(again, "adapter")
        ```
    """
    folder = Path(folder).expanduser().absolute()
    lora = check_adapter(causal_lm)
    arrays, modules = {}, set()
    for name, weight in _matrices(causal_lm).items():
        if isinstance(weight.layer, LoraLayer):
            first, second = weight.layer.lora_a, weight.layer.lora_b
            arrays[f"{_PREFIX}{name}.lora_A.weight"] = _transposed(first)
            arrays[f"{_PREFIX}{name}.lora_B.weight"] = _transposed(second)
            modules.add(name.split(".")[-1])
    source = getattr(causal_lm, "source", None)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source) if source else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
    }
    if backend.process_index() == 0:
        folder.parent.mkdir(parents=True, exist_ok=True)
        check_replaceable(folder, lambda names: names - {_CONFIG, _WEIGHTS})
        with written_beside(folder) as new:
            save_file(arrays, new / _WEIGHTS, metadata={"format": "pt"})
            (new / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    backend.exchange("")
    return folder


def load_adapter(causal_lm: keras.Model, folder: str | Path) -> None:
    """Loads a LoRA adapter that `peft` or `save_adapter` saved.

    A model without adapters gets those of the folder, with their rank, alpha
    and targets, and everything else in it is frozen. A model that has some
    has to have been loaded with the same options.

    Args:
        causal_lm: A model of the architecture that the adapter is for.
        folder: A folder with `adapter_config.json` and
            `adapter_model.safetensors`.

    Raises:
        ValueError: If it isn't an adapter, adapts what can't be adapted
            here, or in a way that isn't plain LoRA. Then the model is
            unchanged.
    """
    folder = Path(folder).expanduser()
    rank, alpha = _read_config(folder)
    factors = _read_factors(folder)
    matrices = _matrices(causal_lm)
    _check_modules(folder, factors, matrices, rank)
    layers = [matrices[name].layer for name in factors]
    lora = Lora(rank, alpha, sorted({str(role_of(layer)) for layer in layers}))
    present = find_lora(causal_lm.backbone)
    if present is None:
        add_lora(causal_lm.backbone, lora)
    elif present != lora:
        raise ValueError(
            f"{folder} holds {lora}, and the model has {present}. Load the "
            "model with the adapter's options, or without `lora_rank`: "
            "`load_adapter` adds what the adapter needs."
        )
    for name, (first, second) in factors.items():
        layer = matrices[name].layer
        layer.lora_a.assign(first.T)
        layer.lora_b.assign(second.T)


def _matrices(causal_lm: keras.Model) -> dict[str, Weight]:
    """The decoder blocks' linear layers by peft's names of them."""
    config = read_config(causal_lm.backbone)
    return {
        weight.name.removesuffix(".weight"): weight
        for weight in list_weights(causal_lm.backbone, config)
        if weight.attribute == "kernel" and role_of(weight.layer)
    }


def check_adapter(causal_lm: keras.Model) -> Lora:
    """The adapters of a model that `save_adapter` can save.

    Raises:
        ValueError: If it has none, trains other variables beside them, or
            is of an architecture without a row in the table.
    """
    backbone = causal_lm.backbone
    lora, layers = find_lora(backbone), lora_layers(backbone)
    ours = {id(v) for x in layers for v in (x.lora_a, x.lora_b)}
    others = [v for v in backbone.trainable_variables if id(v) not in ours]
    if lora is None or others:
        raise ValueError(
            "An adapter holds LoRA's factors only, expected a model from "
            f"`keras_iris.load(..., lora_rank=16)`. This one has {len(ours)} "
            f"of them, and trains {len(others)} other variables. Use "
            "`keras_iris.export` or Keras' `save_weights`."
        )
    read_config(backbone)
    return lora


def _read_config(folder: Path) -> tuple[int, float]:
    """Rank and alpha, if they are all that there is to know."""
    config = read_json(folder / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise _refusal(folder, f"peft_type={config.get('peft_type')!r}")
    start = config.pop("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _refusal(folder, f"init_lora_weights={start!r}")
    for name, value in config.items():
        if name not in _KNOWN and value not in _NEUTRAL:
            raise _refusal(folder, f"{name}={value!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise _refusal(folder, f"r={rank!r} and lora_alpha={alpha!r}")
    # Rank-stabilised LoRA divides by the root of the rank.
    scale = rank**0.5 if config.get("use_rslora") else 1.0
    return rank, alpha * scale


def _read_factors(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both factors of each module, in peft's shapes."""
    try:
        arrays = load_file(folder / _WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{folder} has no readable {_WEIGHTS}: {error}. Expected a folder "
            "from peft's or keras_iris' way to save adapters."
        ) from error
    pattern = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight")
    factors: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        if not (match := pattern.fullmatch(name)):
            raise _refusal(folder, f"weights of {name!r}")
        factors.setdefault(match[1], {})[match[2]] = array.astype("float32")
    empty = np.zeros((0, 0), "float32")
    return {
        name: (pair.get("A", empty), pair.get("B", empty))
        for name, pair in factors.items()
    }


def _check_modules(
    folder: Path,
    factors: dict[str, tuple[np.ndarray, np.ndarray]],
    matrices: dict[str, Weight],
    rank: int,
) -> None:
    """Refuses other modules than all of some roles, and other shapes."""
    roles = set()
    for name, (first, second) in factors.items():
        if name not in matrices:
            raise _refusal(folder, f"an adapter of {name!r}")
        num_outputs, num_inputs = matrices[name].shape
        shapes = [first.shape, second.shape]
        if shapes != [(rank, num_inputs), (num_outputs, rank)]:
            raise ValueError(
                f"{folder} has factors of the shapes {shapes} for {name}, a "
                f"matrix of shape {matrices[name].shape} in this model, and "
                f"rank {rank}. Load the model that the adapter was trained on."
            )
        roles.add(role_of(matrices[name].layer))
    for name, weight in matrices.items():
        if name not in factors and role_of(weight.layer) in roles:
            raise _refusal(folder, f"no adapter of {name!r}, but of others")
    if not roles:
        raise _refusal(folder, "no weights")


def _refusal(folder: Path, received: str) -> ValueError:
    return ValueError(
        f"The adapter in {folder} has {received}. Expected plain LoRA of all "
        "layers of a kind, such as every query projection. Merge the adapter "
        "with peft's `merge_and_unload`, save the model, and load that."
    )


def _transposed(variable: keras.Variable) -> np.ndarray:
    return np.ascontiguousarray(backend.read(variable).T)
