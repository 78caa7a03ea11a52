"""LoRA adapters in the layout of the `peft` library.

KerasHub's adapter of a projection has rank r per head: for head u it is
A[:, u, :] @ B, with B shared by the heads. As one matrix that is an adapter of
rank heads * r, whose second factor is block-diagonal. So every KerasHub
adapter is a PEFT adapter, but not the other way round.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from keras_iris.data.text_files import read_json
from keras_iris.hub.architectures import read_config
from keras_iris.hub.weights import Weight, list_weights

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
PEFT_FILES = (_CONFIG, _WEIGHTS)


def write_peft(causal_lm: keras.Model, folder: Path) -> None:
    """Writes the adapters of a model of which nothing else is trained.

    Args:
        causal_lm: The model.
        folder: Where to write.

    Raises:
        ValueError: If other variables are trainable too.
    """
    arrays: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    names = set()
    for weight in _adapted(causal_lm):
        a, b = _factors(weight.layer)
        key = _key(weight)
        arrays[f"{key}.lora_A.weight"] = a
        arrays[f"{key}.lora_B.weight"] = b
        module = _module(weight)
        ranks[module] = a.shape[0]
        scale = weight.layer.lora_alpha / weight.layer.lora_rank
        alphas[module] = scale * a.shape[0]
        names |= {
            weight.layer.lora_kernel_a.path,
            weight.layer.lora_kernel_b.path,
        }
    others = [
        v.path
        for v in causal_lm.backbone.trainable_variables
        if v.path not in names
    ]
    if others or not arrays:
        raise ValueError(
            "PEFT's layout holds LoRA adapters only, expected a model from "
            f"`keras_iris.load(..., lora_rank=...)`. {len(others)} other "
            f"variables are trainable, such as {others[:1]}. Save to a file "
            "that ends in .safetensors instead."
        )
    save_file(arrays, folder / _WEIGHTS, metadata={"format": "pt"})
    config = _config(causal_lm, ranks, alphas)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_peft(causal_lm: keras.Model, folder: Path) -> dict[str, np.ndarray]:
    """Values of the model's adapter variables, by path.

    Args:
        causal_lm: A model with LoRA enabled.
        folder: A folder in PEFT's layout.

    Raises:
        ValueError: If the adapters aren't those of a KerasHub model like
            this one.
    """
    config = read_json(folder / _CONFIG)
    try:
        stored = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} has no readable {_WEIGHTS}: {error}. Expected a folder "
            "from `keras_iris.hub.save_adapter`."
        ) from error
    _check_config(folder, config)
    values: dict[str, np.ndarray] = {}
    for weight in _adapted(causal_lm):
        key, layer = _key(weight), weight.layer
        a = stored.pop(f"{key}.lora_A.weight", None)
        b = stored.pop(f"{key}.lora_B.weight", None)
        expected = [factor.shape for factor in _factors(layer)]
        if a is None or b is None or [a.shape, b.shape] != expected:
            raise _not_ours(folder, f"{key} isn't of the shapes {expected}")
        scale = _scale(config, _module(weight), a.shape[0])
        here = layer.lora_alpha / layer.lora_rank
        values |= _unfold(folder, layer, a * (scale / here), b)
    if stored:
        raise _not_ours(folder, f"it also adapts {next(iter(stored))}")
    return values


def _adapted(causal_lm: keras.Model) -> Iterator[Weight]:
    config = read_config(causal_lm.backbone)
    for weight in list_weights(causal_lm.backbone, config):
        is_kernel = weight.attribute == "kernel"
        if is_kernel and getattr(weight.layer, "lora_enabled", False):
            if len(weight.layer.lora_kernel_a.shape) != 3:
                raise ValueError(
                    f"The adapter of {weight.name} isn't one of a query or "
                    "value projection and has no PEFT layout here. Save to a "
                    "file that ends in .safetensors instead."
                )
            yield weight


def _key(weight: Weight) -> str:
    return "base_model.model." + weight.name.removesuffix(".weight")


def _module(weight: Weight) -> str:
    return weight.name.split(".")[-2]


def _hidden_first(layer: keras.layers.Layer, a: np.ndarray) -> np.ndarray:
    """A as (hidden, heads, rank); Gemma has the heads first. Own inverse."""
    heads_first = layer.equation.split(",")[1].startswith(("nd", "kd"))
    return a.transpose(1, 0, 2) if heads_first else a


def _factors(layer: keras.layers.Layer) -> tuple[np.ndarray, np.ndarray]:
    """(heads * rank, hidden) and (heads * head_dim, heads * rank)."""
    a = _hidden_first(layer, _to_numpy(layer.lora_kernel_a))
    b = _to_numpy(layer.lora_kernel_b)  # (rank, head_dim)
    hidden, heads, rank = a.shape
    first = a.reshape(hidden, heads * rank).T
    second = np.kron(np.eye(heads, dtype=b.dtype), b.T)
    return np.ascontiguousarray(first), np.ascontiguousarray(second)


def _unfold(
    folder: Path, layer: keras.layers.Layer, a: np.ndarray, b: np.ndarray
) -> dict[str, np.ndarray]:
    rank, head_dim = layer.lora_kernel_b.shape
    heads = b.shape[0] // head_dim
    kernel_b = np.asarray(b[:head_dim, :rank].T)
    block_diagonal = np.kron(np.eye(heads, dtype=b.dtype), kernel_b.T)
    if not np.array_equal(b, block_diagonal):
        raise _not_ours(folder, "its factors aren't shared by the heads")
    kernel_a = a.T.reshape(-1, heads, rank)
    return {
        layer.lora_kernel_a.path: _hidden_first(layer, kernel_a),
        layer.lora_kernel_b.path: kernel_b,
    }


def _config(
    causal_lm: keras.Model, ranks: dict[str, int], alphas: dict[str, float]
) -> dict[str, Any]:
    first = next(iter(ranks))
    source = getattr(causal_lm, "source", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source) if source else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuses what would change how the factors count."""
    if config.get("peft_type") != "LORA":
        raise _not_ours(
            folder,
            f"its {_CONFIG} has the peft_type {config.get('peft_type')!r} and "
            "not 'LORA'",
        )
    for name in ("use_rslora", "use_dora"):
        if config.get(name):
            raise _not_ours(folder, f"its {_CONFIG} has {name}=true")
    for pattern in config.get("alpha_pattern") or {}:
        if not pattern.isidentifier():
            raise _not_ours(
                folder, f"its alpha_pattern {pattern!r} isn't a module's name"
            )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = (config.get("alpha_pattern") or {}).get(module)
    if alpha is None:
        alpha = config.get("lora_alpha", rank)
    return float(alpha) / rank


def _not_ours(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"The adapter in {folder} doesn't fit KerasHub's LoRA of this model: "
        f"{reason}. Expected one from `keras_iris.hub.save_adapter`, of the "
        "same preset and `lora_rank`; another one can be merged with peft's "
        "`merge_and_unload`, saved, and loaded as a model."
    )


def _to_numpy(variable: keras.Variable) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")))
