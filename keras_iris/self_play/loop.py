"""The loop of self-play: generate, score, fit, evaluate, and again.

A state machine over the files of `RunDir`: whatever is there and whole is
used, whatever isn't is made. It knows nothing of text beyond a tokenizer and
nothing of objectives beyond what the model was compiled with.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris import backend
from keras_iris.arguments import check_count, check_positive
from keras_iris.data import ChatTemplate, PairDataset, Tokenizer
from keras_iris.data.buckets import choose_bucket_lengths
from keras_iris.data.tokenize import OnOverflow
from keras_iris.generation import Engine, KerasEngine
from keras_iris.generation.engine import check_prompts
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.examples import prepare_examples
from keras_iris.self_play.opponent import Opponent, check_engine
from keras_iris.self_play.rest import Rest
from keras_iris.self_play.run_dir import RunDir
from keras_iris.self_play.settings import (
    hash_examples,
    hash_variables,
    model_settings,
    part_settings,
)
from keras_iris.self_play.step_callbacks import (
    CheckpointWriter,
    StepLogger,
    StepSeeds,
    combine_seeds,
)

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
            left. A list of `Example` stays as it is, whatever its lengths.
        max_response_length: Tokens of a response, annotated or synthetic.
        on_overflow: What becomes of longer annotated responses: `"drop"`,
            `"truncate"` or `"error"`, as in `keras_iris.data.tokenize`.
        tokenizer: A `keras_iris.data.Tokenizer`; by default the one of
            `keras_iris.load`, or of the causal LM's preprocessor.
        template: The chat template; by default that of `keras_iris.load`.
        engine: What generates; by default a `KerasEngine`.
        evaluate: Maps the model to scores on held-out data; runs before the
            first iteration and after each.
        callbacks: Keras callbacks for `fit`, such as `AlphaScheduler`; their
            epochs count on over the iterations. Each epoch is a `fit` of its
            own, in which those of Keras forget the epochs before.
        shard_size: Responses of a file; what a crash loses at most.
        checkpoint_every_minutes: Longest time between checkpoints within an
            epoch; there is one after each epoch in any case.
        checkpoint_every_steps: Most steps between them, None for any number.
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
        on_overflow: OnOverflow = "drop",
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        engine: Engine | None = None,
        evaluate: Evaluate | None = None,
        callbacks: keras.callbacks.Callback
        | Sequence[keras.callbacks.Callback] = (),
        shard_size: int = 512,
        checkpoint_every_minutes: float = 10.0,
        checkpoint_every_steps: int | None = None,
        seed: int = 0,
        title: str = "Self-play",
    ) -> None:
        if not model.compiled or model.loss is None:
            raise ValueError(
                "`model` has to be compiled with a loss before self-play. "
                "Call `model.compile(optimizer=..., "
                "loss=keras_iris.losses.IRIS())` first."
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "Self-play logs and checks every step. Compile the model with "
                "steps_per_execution=1. Received: "
                f"{model.steps_per_execution}"
            )
        if isinstance(callbacks, keras.callbacks.Callback):
            callbacks = [callbacks]
        counts = {
            "iterations": iterations,
            "epochs": epochs,
            "batch_size": batch_size,
            "max_prompt_length": max_prompt_length,
            "max_response_length": max_response_length,
            "shard_size": shard_size,
        }
        counts = {name: check_count(name, v) for name, v in counts.items()}
        check_positive("checkpoint_every_minutes", checkpoint_every_minutes)
        if checkpoint_every_steps is not None:
            check_count("checkpoint_every_steps", checkpoint_every_steps)
        seed = check_count("seed", seed, at_least=0)
        if batch_size > model.recent.num_rows:
            raise ValueError(
                f"`batch_size` may be {model.recent.num_rows} pairs at most, "
                f"as every step is logged. Received: {batch_size}"
            )
        self.model = model
        self.examples, end_token_ids, fingerprint = prepare_examples(
            model.causal_lm,
            data,
            tokenizer=tokenizer,
            template=template,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            on_overflow=on_overflow,
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
        check_engine(
            self.engine,
            model.causal_lm,
            end_token_ids=end_token_ids,
            max_response_length=max_response_length,
        )
        prompts = [example.prompt_ids.tolist() for example in self.examples]
        buckets = self.engine.get_config().get("bucket_lengths", [None])
        check_prompts(prompts, buckets[-1])
        # Few shapes, the same in all iterations.
        lengths = np.array([len(prompt) for prompt in prompts])
        self.bucket_lengths = choose_bucket_lengths(
            lengths + [len(e.response_ids) for e in self.examples],
            longest=int(lengths.max()) + max_response_length,
        )
        self.evaluate = evaluate
        self.callbacks = list(callbacks)
        self.checkpoint_every_minutes = checkpoint_every_minutes
        self.checkpoint_every_steps = checkpoint_every_steps
        self.seed = seed
        self._data_key = f"{fingerprint}-{hash_examples(self.examples)}"
        settings = {
            **counts,
            "on_overflow": on_overflow,
            "seed": seed,
            "num_examples": len(self.examples),
            "data": self._data_key,
            "end_token_ids": list(end_token_ids),
            **part_settings(self.engine, self.callbacks),
            **model_settings(model),
        }
        self.folder = RunDir(run_dir, settings, title=title)
        self.opponent = Opponent(
            model,
            self.engine,
            self.examples,
            self.folder,
            end_token_ids=end_token_ids,
            batch_size=batch_size,
            bucket_lengths=self.bucket_lengths,
            max_response_length=max_response_length,
            shard_size=shard_size,
            seed=seed,
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = -(-len(self.examples) // self.batch_size)
        return steps * self.epochs * self.iterations

    def run(self) -> Path:
        """Runs all iterations that aren't done yet.

        It stops where a callback sets `model.stop_training`; another `run`
        goes on from there.

        Returns:
            The run's folder.

        Raises:
            FloatingPointError: A log-prob is NaN or infinite; the checkpoint
                on disk is of before.
        """
        self.folder.write_manifest()
        self.model.optimizer.build(self.model.trainable_variables)
        position = self.folder.read_checkpoint(self._variables())
        if position is None:
            if scores := self._evaluate(0):
                print(_line(0, scores))
            position = {"iteration": 1, "epoch": 0, "batch": 0}
            self._write_checkpoint(position)
        for iteration in range(position["iteration"], self.iterations + 1):
            if iteration != position["iteration"]:
                position = {"iteration": iteration, "epoch": 0, "batch": 0}
            if not self._run_iteration(position):
                print("Stopped by a callback; `run` goes on from here.")
                break
        return self.folder.path

    def _run_iteration(self, position: dict[str, Any]) -> bool:
        """Runs the rest of an iteration; false where a callback stops it."""
        iteration = position["iteration"]
        is_started = position["epoch"] > 0 or position["batch"] > 0
        # Shards of a half-trained iteration are the opponent's, which the
        # weights in memory are not any more: their key is in the checkpoint.
        key = position.get("key") if is_started else None
        key = key or f"{self._data_key}-{hash_variables(self._weights())}"
        responses, log_probs, timing = self.opponent.play(
            iteration, key, is_over=is_started
        )
        start = time.perf_counter()
        loggers, is_whole = self._fit(
            {**position, "key": key}, responses, log_probs
        )
        if not is_whole:
            return False
        seconds = time.perf_counter() - start
        num_tokens = sum(logger.num_tokens for logger in loggers)
        timing |= {
            "fit_seconds": round(seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
        }
        self.folder.log("iteration", iteration=iteration, **timing)
        scores = self._evaluate(iteration)
        means = loggers[-1].means() if loggers else {}
        print(_line(iteration, scores | means | timing))
        self._write_checkpoint(
            {"iteration": iteration + 1, "epoch": 0, "batch": 0}
        )
        return True

    def _fit(
        self,
        position: dict[str, Any],
        responses: list[np.ndarray],
        log_probs: np.ndarray,
    ) -> tuple[list[StepLogger], bool]:
        """Trains from `position` to the end of the iteration.

        Returns:
            A logger for each epoch, and whether no callback has stopped it.
        """
        iteration = position["iteration"]
        first_epoch, first_batch = position["epoch"], position["batch"]
        loggers = []
        for epoch in range(first_epoch, self.epochs):
            dataset = PairDataset(
                self.examples,
                responses,
                log_probs,
                batch_size=self.batch_size,
                bucket_lengths=self.bucket_lengths,
                seed=combine_seeds(self.seed, iteration),
                epoch=epoch,
            )
            here = {**position, "epoch": epoch}
            rest = Rest(dataset, first_batch)
            keep = CheckpointWriter(
                self._write_checkpoint,
                here,
                first_batch=first_batch,
                every_steps=self.checkpoint_every_steps,
                every_minutes=self.checkpoint_every_minutes,
            )
            seeds = StepSeeds((self.seed, iteration, epoch), first_batch)
            logger = StepLogger(self.folder.log, iteration, rest.indices)
            print(f"Iteration {iteration}, epoch {epoch + 1}/{self.epochs}")
            self.model.fit(
                backend.dataset(rest),
                shuffle=False,
                initial_epoch=(iteration - 1) * self.epochs + epoch,
                epochs=(iteration - 1) * self.epochs + epoch + 1,
                # The checkpoint last: with all that the others have set.
                callbacks=[seeds, logger, *self.callbacks, keep],
            )
            loggers.append(logger)
            num_done = first_batch + logger.num_steps
            is_stopped = self.model.stop_training
            if is_stopped and num_done < len(dataset):
                self._write_checkpoint({**here, "batch": num_done})
            else:
                here |= {"epoch": epoch + 1, "batch": 0}
                self._write_checkpoint(here)
            if is_stopped:
                return loggers, False
            first_batch = 0
        return loggers, True

    def _evaluate(self, iteration: int) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        start = time.perf_counter()
        scores = self.evaluate(self.model)
        return self.folder.log_scores(
            scores,
            iteration=iteration,
            step=int(self.model.optimizer.iterations.value),
            seconds=round(time.perf_counter() - start, 3),
        )

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


def _line(iteration: int, values: dict[str, float]) -> str:
    numbers = ", ".join(f"{name} {v:.4g}" for name, v in values.items())
    return f"Iteration {iteration}: {numbers}"
