"""The loop of self-play: generate, score, fit, evaluate, and again.

A state machine over the files of `RunDir`: whatever is there and whole is
used, whatever isn't is made. It knows nothing of text beyond a tokenizer and
nothing of objectives beyond what the model was compiled with.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.data import ChatTemplate, Example, PairDataset, Tokenizer
from keras_iris.generation import Engine, KerasEngine, check_log_probs
from keras_iris.models import SelfPlayModel, score_pairs
from keras_iris.self_play.examples import prepare_examples
from keras_iris.self_play.run_dir import RunDir
from keras_iris.self_play.step_callbacks import CheckpointWriter, StepLogger

Evaluate = Callable[[SelfPlayModel], dict[str, float]]


class SelfPlay:
    """Self-play fine-tuning of a compiled `SelfPlayModel`.

    In each iteration the model answers the training prompts itself, its
    log-probs of both answers are stored (it is its own opponent), and `fit`
    trains it to prefer the annotated ones. `run` on the folder of a run that
    was cut off goes on with it, and ends in the same weights on the same
    machine and backend.

    Args:
        model: A compiled `SelfPlayModel`. Its optimizer goes on through all
            iterations; `num_steps` is what a learning-rate schedule has to
            span.
        data: Rows, a path or a data set that `keras_iris.data` reads, or a
            list of `keras_iris.data.Example`.
        run_dir: Folder of the run.
        iterations: Number of iterations.
        epochs: Epochs of an iteration.
        batch_size: Pairs of a batch; the mean of the loss is over all.
        max_prompt_length: Tokens of a prompt; longer ones are cut on the
            left.
        max_response_length: Tokens of a response, annotated or synthetic.
        tokenizer: A `keras_iris.data.Tokenizer`; by default the one of
            `keras_iris.load`, or of the causal LM's preprocessor.
        template: The chat template; by default that of `keras_iris.load`.
        engine: What generates; by default a `KerasEngine`.
        evaluate: Maps the model to scores on held-out data; runs before the
            first iteration and after each.
        callbacks: Keras callbacks for `fit`, such as `AlphaScheduler`.
        shard_size: Responses of a file; what a crash loses at most.
        checkpoint_every_steps: Steps between checkpoints within an epoch;
            there is one after each epoch in any case.
        seed: Seed of order and sampling.
        title: A line for the report.

    Raises:
        ValueError: The model isn't compiled, the data can't be used, or
            `run_dir` holds a run with other settings.
    """

    def __init__(  # noqa: PLR0913 (options of a run, by keyword only)
        self,
        model: SelfPlayModel,
        data: Any,
        run_dir: str | Path,
        *,
        iterations: int = 5,
        epochs: int = 2,
        batch_size: int = 64,
        max_prompt_length: int = 1024,
        max_response_length: int = 256,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        engine: Engine | None = None,
        evaluate: Evaluate | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        shard_size: int = 512,
        checkpoint_every_steps: int = 100,
        seed: int = 0,
        title: str = "Self-play",
    ) -> None:
        if not model.compiled or model.loss is None:
            raise ValueError(
                "`model` has to be compiled with a loss before self-play. "
                "Call `model.compile(optimizer=..., "
                "loss=keras_iris.losses.IRIS())` first."
            )
        for name, value in {
            "iterations": iterations,
            "epochs": epochs,
            "batch_size": batch_size,
            "shard_size": shard_size,
            "checkpoint_every_steps": checkpoint_every_steps,
        }.items():
            if value < 1:
                raise ValueError(
                    f"`{name}` has to be at least 1. Received: {value}"
                )
        self.model = model
        self.examples, end_token_ids, fingerprint = prepare_examples(
            model.causal_lm,
            data,
            tokenizer=tokenizer,
            template=template,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
        )
        if len(self.examples) < batch_size:
            raise ValueError(
                f"The data have {len(self.examples)} usable rows, fewer than "
                f"batch_size={batch_size}. Lower `batch_size` or add rows."
            )
        self.iterations = iterations
        self.epochs = epochs
        self.batch_size = batch_size
        self.engine = engine or KerasEngine(
            model.causal_lm,
            end_token_ids=end_token_ids,
            max_new_tokens=max_response_length,
        )
        self.evaluate = evaluate
        self.callbacks = list(callbacks)
        self.shard_size = shard_size
        self.checkpoint_every_steps = checkpoint_every_steps
        self.seed = seed
        self._data_key = f"{fingerprint}-{_hash_examples(self.examples)}"
        settings = {
            "iterations": iterations,
            "epochs": epochs,
            "batch_size": batch_size,
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
            "shard_size": shard_size,
            "seed": seed,
            "num_examples": len(self.examples),
            "data": self._data_key,
            "end_token_ids": list(end_token_ids),
            "engine": type(self.engine).__name__,
            **_settings_of("loss", model.loss),
            **_settings_of("optimizer", model.optimizer),
            "micro_batch_size": model.micro_batch_size,
            "parameters": model.causal_lm.count_params(),
            "dtype": model.dtype_policy.name,
            "backend": keras.backend.backend(),
            "callbacks": [type(c).__name__ for c in self.callbacks],
        }
        self.folder = RunDir(run_dir, settings, title=title)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = -(-len(self.examples) // self.batch_size)
        return steps * self.epochs * self.iterations

    def run(self) -> Path:
        """Runs all iterations that aren't done yet.

        Returns:
            The run's folder.

        Raises:
            FloatingPointError: A log-prob is NaN or infinite; the checkpoint
                on disk is of before.
        """
        self.model.optimizer.build(self.model.trainable_variables)
        position = self.folder.read_checkpoint(self._variables())
        if position is None:
            self._evaluate(0)
            position = {"iteration": 1, "epoch": 0, "batch": 0}
            self._write_checkpoint(position)
        for iteration in range(position["iteration"], self.iterations + 1):
            if iteration != position["iteration"]:
                position = {"iteration": iteration, "epoch": 0, "batch": 0}
            self._run_iteration(position)
        return self.folder.path

    def _run_iteration(self, position: dict[str, Any]) -> None:
        iteration = position["iteration"]
        is_started = position["epoch"] > 0 or position["batch"] > 0
        # Shards of a half-trained iteration are the opponent's, which the
        # weights in memory are not any more: their key is in the checkpoint.
        key = position.get("key") if is_started else None
        key = key or f"{self._data_key}-{hash_variables(self._weights())}"
        start = time.perf_counter()
        synthetic, engine_log_probs = self._generate(iteration, key)
        generated = time.perf_counter()
        opponent = self._score(iteration, key, synthetic)
        _check_engine(engine_log_probs, opponent, synthetic)
        scored = time.perf_counter()
        num_tokens = self._fit({**position, "key": key}, synthetic, opponent)
        seconds = time.perf_counter() - scored
        self.folder.log(
            "iteration",
            iteration=iteration,
            generate_seconds=round(generated - start, 3),
            generated_tokens=sum(len(ids) for ids in synthetic),
            score_seconds=round(scored - generated, 3),
            fit_seconds=round(seconds, 3),
            tokens_per_second=round(num_tokens / seconds, 1),
        )
        self._evaluate(iteration)
        self._write_checkpoint(
            {"iteration": iteration + 1, "epoch": 0, "batch": 0}
        )

    def _generate(
        self, iteration: int, key: str
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The opponent's responses and the engine's log-probs of them."""
        responses: list[np.ndarray] = []
        log_probs = []
        shards = self._shards()
        progress = _progress(f"Iteration {iteration}: generate", len(shards))
        for number, examples in enumerate(shards):

            def make(
                examples: list[Example] = examples, number: int = number
            ) -> dict[str, np.ndarray]:
                seeds = np.random.SeedSequence([self.seed, iteration, number])
                completions = self.engine.generate(
                    [example.prompt_ids.tolist() for example in examples],
                    seed=int(seeds.generate_state(1)[0] >> 1),
                )
                ids = [c.token_ids for c in completions]
                # What the engine says of its own samples; NaN: nothing.
                log_probs = [
                    np.nan if c.log_probs is None else np.sum(c.log_probs)
                    for c in completions
                ]
                return {
                    "lengths": np.array([len(i) for i in ids], "int32"),
                    "token_ids": np.concatenate(ids).astype("int32"),
                    "log_probs": np.array(log_probs, "float32"),
                }

            name = f"iteration_{iteration:03d}/synthetic"
            arrays = self.folder.shard(name, number, key, make)
            ends = np.cumsum(arrays["lengths"])[:-1]
            responses.extend(np.split(arrays["token_ids"], ends))
            log_probs.append(arrays["log_probs"])
            progress.update(number + 1)
        return responses, np.concatenate(log_probs)

    def _score(
        self, iteration: int, key: str, synthetic: list[np.ndarray]
    ) -> np.ndarray:
        """The opponent's log-probs of both responses, `(examples, 2)`."""
        scores = []
        shards = self._shards()
        progress = _progress(f"Iteration {iteration}: score", len(shards))
        start = 0
        for number, examples in enumerate(shards):

            def make(
                examples: list[Example] = examples, start: int = start
            ) -> dict[str, np.ndarray]:
                responses = synthetic[start : start + len(examples)]
                log_probs = score_pairs(
                    self.model,
                    examples,
                    responses,
                    batch_size=self.batch_size,
                )
                _check_finite(log_probs, np.arange(len(examples)) + start)
                return {"log_probs": log_probs}

            name = f"iteration_{iteration:03d}/opponent"
            arrays = self.folder.shard(name, number, key, make)
            scores.append(arrays["log_probs"])
            start += len(examples)
            progress.update(number + 1)
        return np.concatenate(scores)

    def _fit(
        self,
        position: dict[str, Any],
        synthetic: list[np.ndarray],
        opponent: np.ndarray,
    ) -> int:
        """Trains from `position` to the end; returns the tokens seen."""
        iteration = position["iteration"]
        first_epoch, first_batch = position["epoch"], position["batch"]
        num_tokens = 0
        for epoch in range(first_epoch, self.epochs):
            dataset = PairDataset(
                self.examples,
                synthetic,
                opponent,
                batch_size=self.batch_size,
                seed=self.seed + iteration,
                epoch=epoch,
            )
            here = {**position, "epoch": epoch}
            rest = _Rest(dataset, first_batch)
            keep = CheckpointWriter(
                self._write_checkpoint,
                here,
                first_batch=first_batch,
                every=self.checkpoint_every_steps,
            )
            logger = StepLogger(self.folder.log, iteration, rest.indices)
            print(f"Iteration {iteration}, epoch {epoch + 1}/{self.epochs}")
            self.model.fit(
                backend.dataset(rest),
                shuffle=False,
                # The checkpoint last: with all that the others have set.
                callbacks=[logger, *self.callbacks, keep],
            )
            self._write_checkpoint({**here, "epoch": epoch + 1, "batch": 0})
            num_tokens += logger.num_tokens
            first_batch = 0
        return num_tokens

    def _evaluate(self, iteration: int) -> None:
        if self.evaluate is None:
            return
        start = time.perf_counter()
        scores = self.evaluate(self.model)
        self.folder.log(
            "evaluation",
            iteration=iteration,
            step=int(self.model.optimizer.iterations.value),
            seconds=round(time.perf_counter() - start, 3),
            **{name: float(value) for name, value in scores.items()},
        )

    def _shards(self) -> list[list[Example]]:
        size = self.shard_size
        return [
            self.examples[start : start + size]
            for start in range(0, len(self.examples), size)
        ]

    def _weights(self) -> list[keras.Variable]:
        return self.model.causal_lm.variables

    def _variables(self) -> list[keras.Variable]:
        """All that training changes."""
        own = ("alpha", "gap_state", "seed_generator_state")
        return [
            *self.model.trainable_variables,
            *(v for v in self.model.non_trainable_variables if v.name in own),
            *self.model.optimizer.variables,
        ]

    def _write_checkpoint(self, position: dict[str, Any]) -> None:
        self.folder.write_checkpoint(self._variables(), position)


class _Rest(keras.utils.PyDataset):
    """A data set without its first batches."""

    def __init__(self, dataset: PairDataset, first_batch: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.dataset) - self.first_batch

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index + self.first_batch]

    def indices(self, index: int) -> np.ndarray:
        return self.dataset.indices(index + self.first_batch)


def hash_variables(variables: list[keras.Variable]) -> str:
    """A hash of the variables' values.

    Raises:
        FloatingPointError: A value isn't finite.
    """
    digest = hashlib.sha256()
    for variable in variables:
        value = keras.ops.convert_to_numpy(variable.value)
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f"The weight {variable.path} is not finite as the iteration "
                "starts. Load the model again, or lower the learning rate."
            )
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def _settings_of(kind: str, part: Any) -> dict[str, Any]:
    """The class of a loss or an optimizer, and its configuration."""
    config = {
        f"{kind}.{name}": value
        if isinstance(value, bool | int | float | str | None)
        else json.dumps(value, default=str)
        for name, value in part.get_config().items()
        if name != "name"
    }
    return {kind: type(part).__name__, **config}


def _check_engine(
    engine_log_probs: np.ndarray,
    opponent: np.ndarray,
    synthetic: list[np.ndarray],
) -> None:
    """The engine's log-probs, where it gives any, have to be the model's."""
    is_given = np.isfinite(engine_log_probs)
    num_tokens = np.array([len(ids) for ids in synthetic])
    if is_given.any():
        check_log_probs(
            engine_log_probs[is_given],
            opponent[is_given, 1],
            num_tokens[is_given],
        )


def _hash_examples(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt_ids, example.response_ids):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(np.asarray(ids, "int32").tobytes())
    return digest.hexdigest()[:16]


def _check_finite(log_probs: np.ndarray, indices: np.ndarray) -> None:
    bad = indices[~np.isfinite(log_probs).all(axis=1)]
    if len(bad):
        raise FloatingPointError(
            f"The log-probs of examples {bad.tolist()} are not finite, "
            "under the model as the iteration starts. Check its weights and "
            "dtype, and these rows of the data."
        )


def _progress(title: str, target: int) -> keras.utils.Progbar:
    print(title)
    return keras.utils.Progbar(target, unit_name="shard")
