"""What a run takes of memory, disk and time, before it is begun."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import keras_hub
import numpy as np

from keras_iris.data import ChatTemplate
from keras_iris.data.tokenize import tokenize
from keras_iris.distribution.make import mesh_sizes
from keras_iris.files import check_room
from keras_iris.generation.batch_rows import (
    DEFAULT_ROWS,
    Sizes,
    float_bytes,
    row_bytes,
    rows_that_fit,
    token_bytes,
)
from keras_iris.generation.rowwise import rowwise_parts
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.inspect import inspect
from keras_iris.losses import IRIS, SelfPlayLoss
from keras_iris.losses.stream import Stream

_MASTER_BYTES = 4  # of a number that is trained, of its gradient, of a slot
_EXPORT_BYTES = 2  # bfloat16
_ID_BYTES = 4
# What an H200 did: 29,000 tokens a second in training, 81,700 generated ones
# in 28.7 s, compilation included (Qwen2.5-3B's shape, LoRA).
_GPU_FLOPS, _GPU_BANDWIDTH = 5e14, 5.5e11
# Tokens and outputs whose logits are held (`keras_iris.models.log_probs`).
_TILES = {True: (2048, 32768), False: (512, 8192)}  # of a GPU, of a CPU
_QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}
# XLA's float32 copies of a layer's numbers, and of attention's scores: theirs,
# their softmax, and the gradients of both.
_SCORE_COPIES, _TILE_COPIES = 4, 3
_TARGETS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def estimate(  # noqa: PLR0913 (by keyword only)
    preset: str | Path,
    conversations: Any = (),
    *,
    revision: str | None = None,
    default_template: ChatTemplate | None = None,
    max_prompt_length: int = 1024,
    max_response_length: int = 1024,
    run_dir: str | Path | None = None,
    **sizes: Any,
) -> "RunEstimate":
    """Checks a run without its weights, and estimates what it takes.

    Args:
        preset: As in `keras_iris.load`; of `"hf://org/name"` only the small
            files are downloaded.
        revision: As in `keras_iris.load`.
        conversations: Some rows of the data, which are tokenized: their mean
            lengths are taken.
        default_template: Used where the checkpoint has no chat template.
        max_prompt_length: As in `keras_iris.data.tokenize`.
        max_response_length: As in `keras_iris.data.tokenize`.
        run_dir: The run's folder, whose disk is checked for room.
        **sizes: Arguments of `RunEstimate`.

    Returns:
        The estimate; `print` it.

    Raises:
        ValueError: `keras_iris.load` would refuse the preset, or
            `keras_iris.data.tokenize` the conversations, or the disk of
            `run_dir` has too little room.

    Examples:
        ```python
        print(keras_iris.estimate("path/to/folder", lora_rank=16))
        ```
    """
    config, tokenizer, template = inspect(
        preset, revision=revision, default_template=default_template
    )
    if template is not None:
        template.check()
    sizes.setdefault("max_length", max_prompt_length + max_response_length)
    if conversations:
        examples = tokenize(
            conversations,
            tokenizer,
            template=template,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
        )
        first = examples[0]
        sizes |= {
            "prompt_length": np.mean([len(e.prompt_ids) for e in examples]),
            "response_length": np.mean([len(e.response_ids) for e in examples]),
            "sample": tokenizer.decode(
                [*first.prompt_ids, *first.response_ids]
            ),
        }
    run = RunEstimate(config=config, **sizes)
    if run_dir is not None:
        check_room(run.disk()["together"], Path(run_dir).expanduser())
    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What a self-play run takes, from its sizes: estimates, on JAX.

    What is trained is float32: adapters, or without LoRA all weights. Each
    layer's activations are computed again in the backward pass.

    In bfloat16 on CPUs the memory is within 15% of what XLA allocates
    (`tests/test_run_estimate.py`). On a GPU there is one measurement,
    Qwen2.5-3B's shape with LoRA on an H200, 17.2 GB: there the layers'
    matrices must have been in memory twice, so that is counted; why is unknown.

    Args:
        config: The decoder's sizes, as `keras_iris.hub.inspect` gives them.
        num_prompts: Prompts of an iteration.
        prompt_length: Mean tokens of a prompt.
        response_length: Mean tokens of an annotated response.
        new_tokens: Tokens of a synthetic response.
        num_samples: Synthetic responses to a prompt in an iteration.
        max_length: Most tokens of prompt and response.
        iterations: Number of iterations.
        epochs: Epochs of an iteration.
        micro_batch_size: Pairs of a forward and backward pass.
        dtype: As in `keras_iris.load`.
        loss: What is trained with, of as many responses as it takes.
        generation_batch_size: Prompts that are answered together. By default
            as many as `keras_iris.generation.KerasEngine` would take of the
            memory that training needs.
        lora_rank: Rank of the adapters, or `None` to train all weights.
        lora_targets: As in `keras_iris.load`.
        quantize: `"int8"`, `"int4"` or `None`.
        mesh: As in `keras_iris.distribution.make_distribution`; by default
            there is one device.
        strategy: As there.
        optimizer_slots: Numbers that the optimizer keeps for each trained one.
        needs_folder: Whether the engine reads exported weights.
        flops_per_second: Floating-point operations of a device, not its peak.
            By default what an H200 did; of a CPU nothing is known.
        bytes_per_second: Bytes that it reads from its memory, likewise.
        is_gpu: Or a CPU.
        sample: A prompt with its response, as the model sees them.
    """

    config: Any
    num_prompts: int = 50_000
    prompt_length: float = 256.0
    response_length: float = 256.0
    new_tokens: int = 256
    num_samples: int = 1
    max_length: int = 2048
    iterations: int = 5
    epochs: int = 2
    micro_batch_size: int = 8
    dtype: Any = None
    loss: SelfPlayLoss = dataclasses.field(default_factory=IRIS)
    generation_batch_size: int | None = None
    lora_rank: int | None = None
    lora_targets: Sequence[str] | str = ("query", "value")
    quantize: str | None = None
    mesh: Mapping[str, int] | Literal["auto"] | None = None
    strategy: str = "fsdp"
    optimizer_slots: int = 1
    needs_folder: bool = False
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    is_gpu: bool = True
    sample: str = ""

    def __post_init__(self) -> None:
        """Refuses a mesh that can't be."""
        _ = self._mesh

    @functools.cached_property
    def _mesh(self) -> dict[str, int]:
        """Devices by axis."""
        if not self.mesh:
            return {"data": 1}
        return mesh_sizes(self.mesh, self.strategy)

    @property
    def num_devices(self) -> int:
        """Devices, of which each does its share."""
        return math.prod(self._mesh.values())

    @property
    def num_weights(self) -> int:
        """Numbers of the model itself."""
        return sum(map(math.prod, self.config.weight_shapes().values()))

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        if self.lora_rank is None:
            return self.num_weights
        roles = _TARGETS if self.lora_targets == "all" else self.lora_targets
        ends = tuple(f".{_TARGETS[role]}.weight" for role in roles)
        shapes = self.config.weight_shapes().items()
        sides = sum(sum(shape) for name, shape in shapes if name.endswith(ends))
        return self.lora_rank * sides

    def memory(self) -> dict[str, float]:
        """Bytes on each device.

        Returns:
            Bytes by name; `"training"` and `"generation"` are sums, and the
            larger is what a device needs.
        """
        kept, training = self._kept_bytes(), self._training_bytes()
        prompt_length = max(1, self.max_length - self.new_tokens)
        answers = self._row_bytes(prompt_length) / self.num_devices
        answers *= self._generation_rows(prompt_length)
        gathered = self._gathered_bytes()
        always = sum(kept.values())
        return {
            **kept,
            **training,
            "gathered weights": gathered,
            "answers": answers,
            "training": always + sum(training.values()),
            "generation": always + gathered + answers,
        }

    def disk(self) -> dict[str, float]:
        """Bytes of the run's folder, by name and together."""
        trained = _MASTER_BYTES * self.num_trained
        export = _EXPORT_BYTES * self.num_weights
        length = self.prompt_length + self.response_length
        synthetic = self.iterations * self.num_samples * self.new_tokens
        parts = {
            # The latest, those of two iterations' starts, and a new one while
            # it replaces another.
            "checkpoints": 4 * trained * (1 + self.optimizer_slots),
            "engine's model": 2 * export * self.needs_folder,
            "trained model": export,
            "tokens": _ID_BYTES * self.num_prompts * (length + synthetic),
        }
        return _with_sum(parts)

    def seconds(self) -> dict[str, float]:
        """Time of the whole run on all devices, by its parts and together.

        Nothing for a CPU without the rates.

        2 operations a matrix weight and token forward, 4 backward (2 with
        LoRA), 2 to compute activations again; attention, communication,
        compilation and padding aren't counted. A decoding step takes at least
        the time of reading the weights, and the keys and values.
        """
        if not self._rates:
            return {}
        flops_per_second, bytes_per_second = self._rates
        config = self.config
        weights = self.num_weights
        if not config.tie_word_embeddings:  # a table that is only read
            weights -= config.vocabulary_size * config.hidden_size
        forward = 2 * weights / (flops_per_second * self.num_devices)
        reading = self._weights_bytes() / (bytes_per_second * self.num_devices)
        num_pairs = self.num_prompts * self.num_samples
        lengths = self.prompt_length + np.array(
            [self.response_length, self.new_tokens, self.new_tokens]
        )
        passes = 1 + 1 + (2 if self.lora_rank is None else 1)
        trained = sum(sum(lengths[list(s.columns)]) for s in self._streams)
        rows = self._generation_rows(self.prompt_length)
        # Of an answer half-way through.
        length = self.prompt_length + self.new_tokens / 2
        cache = token_bytes(self._sizes) * length / bytes_per_second
        step = max(forward, reading / rows + cache / self.num_devices)
        once = {
            "generation": num_pairs * forward * self.prompt_length
            + num_pairs * step * self.new_tokens,
            "scoring": num_pairs
            * forward
            * sum(lengths[: self.loss.max_responses]),
            "training": num_pairs * forward * trained * passes * self.epochs,
        }
        return _with_sum({k: self.iterations * v for k, v in once.items()})

    @property
    def _rates(self) -> tuple[float, float] | None:
        """Operations and bytes a second of a device, if they are known."""
        flops, bandwidth = self.flops_per_second, self.bytes_per_second
        if self.is_gpu:
            flops, bandwidth = flops or _GPU_FLOPS, bandwidth or _GPU_BANDWIDTH
        return (flops, bandwidth) if flops and bandwidth else None

    @property
    def _item_bytes(self) -> tuple[int, int]:
        """Of a number of the base, and of one that is computed with."""
        policy = keras.dtype_policies.get(
            self.dtype or keras.config.dtype_policy()
        )
        return (
            float_bytes(policy.variable_dtype),
            float_bytes(policy.compute_dtype),
        )

    def _kept_bytes(self) -> dict[str, float]:
        """On each device, all the time."""
        slots = _MASTER_BYTES * self.num_trained * self.optimizer_slots
        parts = {"weights": self._weights_bytes(), "optimizer": slots}
        kept, computed = self._item_bytes
        if kept != computed:
            parts["bfloat16 copies"] = computed * self.num_weights
        elif self.lora_rank is not None and self.is_gpu:
            parts["copies of matrices"] = self._matrices_bytes()
        return {n: size / self._num_parts for n, size in parts.items()}

    @property
    def _num_parts(self) -> int:
        """Parts of the weights, of which a device has one."""
        return 1 if self.strategy == "data" else self.num_devices

    def _gathered_bytes(self) -> float:
        """Of the weights that a device gets of others to generate."""
        if self.strategy == "data" or self._mesh["data"] == 1:
            return 0.0
        most = self._item_bytes[1] * self.num_weights
        return min(self._weights_bytes(), most) / self._mesh.get("model", 1)

    def _training_bytes(self) -> dict[str, float]:
        """On each device, beside that in a training step."""
        gradients = _MASTER_BYTES * self.num_trained / self._num_parts
        # XLA adds them up at the end, where all are there.
        num_earlier = len(self._streams) - 1
        tokens, outputs = _TILES[self.is_gpu]
        tile = min(tokens, self._rows * self.max_length) * min(
            outputs, self.config.vocabulary_size
        )
        return {
            "gradients": gradients,
            "gradients of earlier terms": gradients * num_earlier,
            "activations": self._activation_bytes() / self.num_devices,
            "logits": _TILE_COPIES * _MASTER_BYTES * tile,
        }

    @property
    def _streams(self) -> list[Stream]:
        """A pass over some of the responses for each."""
        log_probs = np.zeros((1, self.loss.max_responses))
        return self.loss.streams(log_probs, log_probs)

    @property
    def _rows(self) -> int:
        """Sequences of a forward and backward pass, at their most."""
        size = self.micro_batch_size
        return max(
            len(s.columns) * s.part_size(size, None) for s in self._streams
        )

    def _row_bytes(self, prompt_length: float) -> float:
        """Of a prompt that is answered."""
        return row_bytes(
            self._sizes,
            prompt_length=prompt_length,
            new_tokens=self.new_tokens,
        )

    @property
    def _sizes(self) -> Sizes:
        config = self.config
        name = f"{ARCHITECTURES[config.model_type].keras_hub}Backbone"
        parts = rowwise_parts(getattr(keras_hub.models, name))
        return Sizes(
            **{name: getattr(config, name) for name in Sizes._fields[:-2]},
            item_bytes=self._item_bytes[1],
            is_rowwise=parts is not None,
        )

    def _generation_rows(self, prompt_length: float) -> int:
        """Prompts that are answered together, on all devices."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        if not self.is_gpu:
            return DEFAULT_ROWS
        free = sum(self._training_bytes().values()) - self._gathered_bytes()
        rows = rows_that_fit(self._row_bytes(prompt_length), free)
        return self.num_devices * rows

    def _weights_bytes(self) -> float:
        if self.lora_rank is None:
            return _MASTER_BYTES * self.num_weights
        rest = self.num_weights - self._num_matrix_weights()
        base = self._matrices_bytes() + self._item_bytes[0] * rest
        return base + _MASTER_BYTES * self.num_trained

    def _matrices_bytes(self) -> float:
        """Of the layers' matrices."""
        size = _QUANTIZED_BYTES.get(self.quantize or "", self._item_bytes[0])
        return size * self._num_matrix_weights()

    def _num_matrix_weights(self) -> int:
        return sum(
            math.prod(shape)
            for name, shape in self.config.weight_shapes().items()
            if name.endswith("_proj.weight")
        )

    def _activation_bytes(self) -> float:
        """Each layer's input, and one layer with its gradients."""
        config, rows = self.config, self._rows
        queries = config.num_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        layer = (  # normalised, attention's, feed-forward's
            2 * config.hidden_size
            + 2 * (queries + keys)
            + 4 * config.inner_size
        )
        inputs = self._item_bytes[1] * config.num_layers * config.hidden_size
        token = inputs + _MASTER_BYTES * layer
        # KerasHub's attention isn't fused.
        scores = config.num_heads * self.max_length**2
        return float(
            rows * self.max_length * token
            + rows * _SCORE_COPIES * _MASTER_BYTES * scores
        )

    def __str__(self) -> str:
        """Tables of memory, disk and time."""
        kind = "all weights" if self.lora_rank is None else "LoRA"
        memory = f"memory of a device, of {self.num_devices}, in GiB"
        tables = [
            (memory, self.memory(), 2**30),
            ("disk in GiB", self.disk(), 2**30),
        ]
        if self._rates:
            time = "hours at {:.3g} operations and {:.3g} bytes a second"
            tables.append((time.format(*self._rates), self.seconds(), 3600))
        lines = [
            self.sample,
            f"{self.num_weights:,} weights, {self.num_trained:,} trained "
            f"({kind}); estimates, for `remat=True`:",
        ]
        for title, parts, unit in tables:
            lines.append(title)
            lines += [f"  {k:28} {v / unit:10.2f}" for k, v in parts.items()]
        return "\n".join(lines).lstrip()


def _with_sum(parts: dict[str, float]) -> dict[str, float]:
    return parts | {"together": sum(parts.values())}
