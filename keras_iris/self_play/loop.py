"""The loop of self-play: generate, score, fit, evaluate, and again.

A state machine over the files of `RunDir`: whatever is there and whole is
used, whatever isn't is made. It knows nothing of text beyond a tokenizer and
nothing of objectives beyond what the model was compiled with.
"""

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_iris.arguments import check_count, check_positive
from keras_iris.callbacks import SelfPlayCallback
from keras_iris.data import ChatTemplate, PairDataset, Tokenizer
from keras_iris.data.buckets import choose_bucket_lengths
from keras_iris.data.rows import OnBadRow
from keras_iris.data.tokenize import OnOverflow
from keras_iris.evaluation import score_mode
from keras_iris.generation import Engine, KerasEngine
from keras_iris.generation.engine import check_prompts
from keras_iris.metrics import PairBatch, self_play_metrics
from keras_iris.models import SelfPlayModel
from keras_iris.self_play.best import find_best, keep_best, load_best
from keras_iris.self_play.checkpoints import Position
from keras_iris.self_play.examples import prepare_examples
from keras_iris.self_play.opponent import Opponent, check_engine
from keras_iris.self_play.run_dir import LostShard, RunDir
from keras_iris.self_play.seeds import combine_seeds
from keras_iris.self_play.settings import (
    WeightsHash,
    execution_settings,
    hash_examples,
    objective_settings,
)
from keras_iris.self_play.training import Training

Evaluate = Callable[[SelfPlayModel], dict[str, float]]

# With which weights a run of this process left a model, and in which folder.
_LEFT: weakref.WeakKeyDictionary[SelfPlayModel, tuple[Path, str]] = (
    weakref.WeakKeyDictionary()
)


class SelfPlay:
    """Self-play fine-tuning of a compiled `SelfPlayModel`.

    In each iteration the model answers the training prompts itself, its
    log-probs of both answers are stored (it is its own opponent), and one
    `fit` trains it to prefer the annotated ones. `run` on the folder of a run
    that was cut off goes on with it, and ends in the same weights on the same
    machine and backend. More `iterations` extend a finished run.

    The folder belongs to one run: other data, weights to start from, loss,
    optimizer or seed are refused. What doesn't change the result, such as
    `micro_batch_size`, may change.

    Args:
        model: A compiled `SelfPlayModel`. Its optimizer goes on through all
            iterations; `num_steps` is what a learning-rate schedule has to
            span. The logs of every batch have the values of
            `keras_iris.metrics.self_play_metrics`.
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
        on_bad_row: What happens to rows that can't be read: `"drop"` or
            `"error"`.
        tokenizer: A `keras_iris.data.Tokenizer`; by default the one of
            `keras_iris.load`, or of the causal LM's preprocessor.
        template: The chat template; by default that of `keras_iris.load`.
        engine: What generates; by default a `KerasEngine`.
        evaluate: Maps the model to scores on held-out data; runs before the
            first iteration and after each.
        score_modes: `"min"` or `"max"` by the name of a score, for those that
            `keras_iris.evaluation.score_mode` doesn't know.
        keep_best: Name of a score: the weights of the iteration that is best
            in it are kept. `load_best` assigns them.
        callbacks: Keras callbacks for `fit`, such as `AlphaScheduler`, and
            `SelfPlayCallback`s. There is one `fit` an iteration, and epochs
            count on over the iterations. A callback that stops training at
            the end of an epoch, as `EarlyStopping` does, ends the iteration;
            within an epoch it ends `run`, which goes on from there.
        shard_size: Responses of a file; what a crash loses at most.
        checkpoint_every_minutes: Longest time between checkpoints within an
            epoch; there is one after each epoch in any case.
        checkpoint_every_steps: Most steps between them, None for any number.
        seed: Seed of order and sampling.
        title: A line for the report.

    Raises:
        ValueError: The model isn't compiled, the data can't be used, or
            `run_dir` holds another run.
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
        on_bad_row: OnBadRow = "error",
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        engine: Engine | None = None,
        evaluate: Evaluate | None = None,
        score_modes: Mapping[str, str] | None = None,
        keep_best: str | None = None,
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
        for name, value in counts.items():
            check_count(name, value)
        check_positive("checkpoint_every_minutes", checkpoint_every_minutes)
        if checkpoint_every_steps is not None:
            check_count("checkpoint_every_steps", checkpoint_every_steps)
        seed = check_count("seed", seed, at_least=0)
        num_rows = batch_size * model.steps_per_execution
        if num_rows > model.recent.num_rows:
            raise ValueError(
                "Every step is logged, so batch_size * steps_per_execution may "
                f"be {model.recent.num_rows} pairs at most. Received: "
                f"{batch_size} * {model.steps_per_execution}"
            )
        score_modes = dict(score_modes or {})
        for name in [*score_modes, *([keep_best] if keep_best else [])]:
            if score_mode(name, score_modes) is None:
                raise ValueError(
                    f"Whether a high or a low {name!r} is better isn't known. "
                    f'Pass score_modes={{"{name}": "max"}}, or "min".'
                )
        if keep_best and evaluate is None:
            raise ValueError(
                f"keep_best={keep_best!r} needs `evaluate`, which has to give "
                "that score."
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
            on_bad_row=on_bad_row,
            cache_dir=Path(run_dir) / "tokens",
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
        self.callbacks = list(callbacks or ())
        self.checkpoint_every_minutes = checkpoint_every_minutes
        self.checkpoint_every_steps = checkpoint_every_steps
        self.seed = seed
        self._data_key = f"{fingerprint}-{hash_examples(self.examples)}"
        self.score_modes = score_modes
        self.keep_best = keep_best
        self.folder = RunDir(
            run_dir,
            settings={
                "data": self._data_key,
                "num_examples": len(self.examples),
                "end_token_ids": list(end_token_ids),
                "epochs": epochs,
                "batch_size": batch_size,
                "max_response_length": max_response_length,
                "seed": seed,
                **objective_settings(model, self.callbacks),
            },
            execution={
                "iterations": iterations,
                "shard_size": shard_size,
                "max_prompt_length": max_prompt_length,
                "on_overflow": on_overflow,
                "checkpoint_every_minutes": checkpoint_every_minutes,
                "checkpoint_every_steps": checkpoint_every_steps,
                "keep_best": keep_best,
                **execution_settings(model, self.engine, self.callbacks),
            },
            weights=WeightsHash(model.causal_lm)(),
            was_left=self._was_left,
            about={"title": title, "score_modes": score_modes},
        )
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
        """Batches of the whole run, which learning-rate schedules count."""
        steps = -(-len(self.examples) // self.batch_size)
        return steps * self.epochs * self.iterations

    def run(self) -> Path:
        """Runs all iterations that aren't done yet.

        Returns:
            The run's folder.

        Raises:
            FloatingPointError: A log-prob or weight is NaN or infinite; the
                checkpoint on disk is of before.
            ValueError: Another process runs in the folder, or what is there
                is damaged and can't be made again.
        """
        self._hash = WeightsHash(self.model.causal_lm)
        weights = self._hash()
        known = self.folder.checkpoints.weights()
        known.add(self.folder.content["settings"]["weights"])
        if weights not in known and not self._was_left(self.folder.path):
            raise ValueError(
                "The model has other weights than when this `SelfPlay` was "
                "made. Make it again."
            )
        with self.folder.open():
            try:
                self._run()
            finally:
                self._remember()
        return self.folder.path

    def best(self, score: str) -> dict[str, Any]:
        """The iteration with the best value of a held-out score so far.

        Args:
            score: Its name.

        Returns:
            `{"score", "mode", "iteration", "value"}`; iteration 0 is before
            self-play.

        Raises:
            ValueError: There is no such score, or its mode isn't known.
        """
        return find_best(self.folder.path, score, self.score_modes)

    def load_best(self) -> dict[str, Any]:
        """Gives the model the weights that `keep_best` kept.

        Returns:
            As `best` does for them.

        Raises:
            ValueError: None are kept.
        """
        return load_best(self.folder.path, self.model.trainable_variables)

    def _was_left(self, path: Path) -> bool:
        """Whether a run of this folder left the model as it is."""
        left = _LEFT.get(self.model)
        return left == (path, WeightsHash(self.model.causal_lm)())

    def _remember(self) -> None:
        """Notes how the run leaves the model."""
        try:
            _LEFT[self.model] = (self.folder.path, self._hash())
        except Exception:  # an interrupt or a NaN left no whole weights
            _LEFT.pop(self.model, None)

    def _run(self) -> None:
        self.model.add_metrics(self_play_metrics())
        for callback in self.callbacks:
            callback.set_model(self.model)
        self.model.optimizer.build(self.model.trainable_variables)
        position = self.folder.checkpoints.load(self._variables())
        if position is None:
            self._reset_order()
            scores = self._evaluate(0)
            if scores:
                print(_line(0, scores))
            position = _start(1)
            self._save(position)
        while position["iteration"] <= self.iterations:
            try:
                is_whole = self._run_iteration(position)
            except LostShard as error:
                position = self._go_back(position, error)
                continue
            if not is_whole:
                print("Stopped by a callback; `run` goes on from here.")
                return
            position = _start(position["iteration"] + 1)

    def _reset_order(self) -> None:
        """Nothing of another run of this model is left."""
        model = self.model
        model.alpha.assign(model.start_config["loss"].get("alpha", 1.0))
        model.gap.assign(0.0)
        model.gap_sums.assign(np.zeros((2, 3)))

    def _go_back(self, position: Position, error: LostShard) -> Position:
        """The start of the iteration, where lost shards can be made again."""
        start = self.folder.checkpoints.load_start(
            position["iteration"], self._variables()
        )
        if start is None:
            raise error
        warnings.warn(
            f"Iteration {position['iteration']} starts again: {error}",
            stacklevel=4,
        )
        return start

    def _run_iteration(self, position: Position) -> bool:
        """Runs the rest of an iteration; false where a callback stops it."""
        iteration = position["iteration"]
        is_started = position["epoch"] > 0 or position["batch"] > 0
        self._notify("on_iteration_begin", iteration, {})
        # Shards of a half-trained iteration are the opponent's, which the
        # weights in memory are not any more: their key is in the checkpoint.
        key = position.get("key") if is_started else None
        key = key or f"{self._data_key}-{self._hash()}"
        start = time.perf_counter()
        responses, engine_log_probs = self.opponent.answer(
            iteration, key, is_over=is_started
        )
        generated = time.perf_counter()
        num_tokens = np.array([len(ids) for ids in responses])
        timing: dict[str, float] = {
            "generate_seconds": round(generated - start, 3),
            "generated_tokens": int(num_tokens.sum()),
        }
        if not is_started:
            self._notify("on_generate_end", iteration, responses, timing)
        log_probs = self.opponent.score(
            iteration, key, responses, engine_log_probs
        )
        scored = time.perf_counter()
        timing["score_seconds"] = round(scored - generated, 3)
        if not is_started:
            pairs = self._pairs(log_probs, num_tokens)
            self._notify("on_score_end", iteration, pairs, timing)
        dataset = PairDataset(
            self.examples,
            responses,
            log_probs,
            batch_size=self.batch_size,
            bucket_lengths=self.bucket_lengths,
            seed=combine_seeds(self.seed, iteration),
        )
        training = Training(
            self.model,
            dataset,
            epochs=self.epochs,
            seed=self.seed,
            callbacks=self.callbacks,
            log=self.folder.log,
            save=lambda new: self._save({**new, "key": key}),
            every_steps=self.checkpoint_every_steps,
            every_minutes=self.checkpoint_every_minutes,
        )
        if not training.run(position):
            return False
        seconds = time.perf_counter() - scored
        timing["fit_seconds"] = round(seconds, 3)
        timing["tokens_per_second"] = round(
            training.logger.num_tokens / seconds, 1
        )
        self.folder.log("iteration", iteration=iteration, **timing)
        scores = self._evaluate(iteration)
        self._notify("on_iteration_end", iteration, scores | timing)
        print(_line(iteration, scores | training.logger.means() | timing))
        self._save(_start(iteration + 1))
        return True

    def _pairs(
        self, log_probs: np.ndarray, num_synthetic_tokens: np.ndarray
    ) -> PairBatch:
        """All pairs of an iteration as it starts."""
        num_tokens = [len(example.response_ids) for example in self.examples]
        log_probs = log_probs.astype("float64")
        return PairBatch(
            opponent=log_probs,
            policy=log_probs,
            num_tokens=np.stack([num_tokens, num_synthetic_tokens], axis=1),
            sample_weight=np.ones(len(log_probs)),
        )

    def _notify(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            if isinstance(callback, SelfPlayCallback):
                getattr(callback, hook)(*arguments)

    def _evaluate(self, iteration: int) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        start = time.perf_counter()
        scores = self.evaluate(self.model)
        steps = self.num_steps // self.iterations
        scores = self.folder.log_scores(
            scores,
            iteration=iteration,
            step=iteration * steps,
            seconds=round(time.perf_counter() - start, 3),
        )
        if self.keep_best is not None:
            keep_best(
                self.folder.path,
                self.model.trainable_variables,
                iteration=iteration,
                scores=scores,
                score=self.keep_best,
                score_modes=self.score_modes,
                weights=self._hash(),
            )
        return scores

    def _variables(self) -> list[keras.Variable]:
        """All that training changes."""
        own = ("alpha", "gap", "gap_sums", "seed_generator_state")
        return [
            *self.model.trainable_variables,
            *(v for v in self.model.non_trainable_variables if v.name in own),
            *self.model.optimizer.variables,
        ]

    def _save(self, position: Position) -> None:
        is_start = position["epoch"] == position["batch"] == 0
        self.folder.checkpoints.save(
            self._variables(),
            position,
            **({"weights": self._hash()} if is_start else {}),
        )


def _start(iteration: int) -> Position:
    return {"iteration": iteration, "epoch": 0, "batch": 0}


def _line(iteration: int, values: dict[str, float]) -> str:
    numbers = ", ".join(f"{name} {v:.4g}" for name, v in values.items())
    return f"Iteration {iteration}: {numbers}"
