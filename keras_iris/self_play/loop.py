"""The loop of self-play: generate, score, fit, evaluate, and again.

A state machine over the files of `RunDir`: whatever is there and whole is
used, whatever isn't is made. It knows nothing of text beyond a tokenizer and
nothing of objectives beyond what the model was compiled with.
"""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from keras_iris import backend
from keras_iris.callbacks import SelfPlayCallback
from keras_iris.data import PairDataset
from keras_iris.data.buckets import choose_bucket_lengths
from keras_iris.data.example import hash_examples
from keras_iris.generation import KerasEngine
from keras_iris.metrics import PairBatch, self_play_metrics
from keras_iris.self_play.alarms import Alarms
from keras_iris.self_play.best import Best
from keras_iris.self_play.checkpoints import Position, state_of
from keras_iris.self_play.control import Control, new_optimizer
from keras_iris.self_play.engine_checks import check_engine
from keras_iris.self_play.examples import prepare_examples
from keras_iris.self_play.opponent import Opponent
from keras_iris.self_play.options import Options
from keras_iris.self_play.processes import from_first
from keras_iris.self_play.run_dir import (
    LostShard,
    Manifest,
    RunDir,
)
from keras_iris.self_play.run_log import read_metrics
from keras_iris.self_play.seeds import combine_seeds
from keras_iris.self_play.settings import (
    WeightsHash,
    execution_settings,
    result_settings,
    versions,
)
from keras_iris.self_play.termination import Termination
from keras_iris.self_play.training import Training


@dataclass(eq=False, repr=False)
class SelfPlay(Options):
    """Self-play fine-tuning of a compiled `SelfPlayModel`.

    In each iteration the model answers the training prompts itself, its
    log-probs of both answers are stored (it is its own opponent), and one
    `fit` trains it to prefer the annotated ones. `run` on the folder of a run
    that was cut off goes on with it, and ends in the same weights on the same
    machine and backend. More `iterations` extend a finished run.

    The folder belongs to one run, whose settings are those of `model` when
    `run` begins: other data, weights to start from, architecture, loss,
    optimizer or seed are refused. What doesn't change the result, such as
    `micro_batch_size`, may change. In a new folder a model that has been
    trained before starts with its weights and learning rate, but with a new
    optimizer's state and with the order that its loss was compiled with.

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
        batch_size: Pairs of a batch; the mean of the loss is over all. A
            multiple of `num_samples`, as in `keras_iris.data.PairDataset`.
        num_samples: Synthetic responses to a prompt in an iteration, each a
            pair with the annotated one. More of them are less noise, and as
            many times the work.
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
            `keras_iris.metrics.score_mode` doesn't know.
        control: A loss, or the name of one (`"sft"`, `"spin"`, `"space"`,
            `"spif"`, `"tspin"`): after the run the same model is trained with
            it from the same start, in the same steps and order, and evaluated
            at the same points, in the folder `control`; the report compares
            the two. Then the model is again as the run has left it. SFT draws
            no responses.
        control_learning_rate: A number or schedule; by default the run's.
        keep_best: Name of a score: the weights of the iteration that is best
            in it are kept. `load_best` assigns them.
        callbacks: Keras callbacks for `fit`, such as `AlphaScheduler`, and
            `SelfPlayCallback`s. There is one `fit` an iteration, and epochs
            count on over the iterations. A callback that stops training at
            the end of an epoch, as `EarlyStopping` does, ends the iteration;
            within an epoch it ends `run`, which goes on from there. What
            callbacks of Keras remember, such as the best value and the
            patience of `EarlyStopping` and `ReduceLROnPlateau`, isn't saved:
            they start anew where a run is resumed. `BackupAndRestore`, which
            would go on from weights of its own, is refused.
        shard_size: Responses of a file; what a crash loses at most.
        checkpoint_every_minutes: Longest time between checkpoints within an
            epoch; there is one after each epoch in any case.
        checkpoint_every_steps: Most steps between them, None for any number.
        compilation_cache: Folder where JAX keeps compiled programs, so that
            a run that is taken up again doesn't wait for them; None for no
            such folder. A folder that JAX was given otherwise stays.
        seed: Seed of order and sampling.
        title: A line for the report.

    Raises:
        ValueError: The model isn't compiled, the data can't be used, or
            `run_dir` holds another run.
    """

    def __post_init__(self, data: Any, run_dir: str | Path) -> None:
        """Checks all arguments, and that the run may go on in its folder."""
        self.check()
        self.check_model()
        causal_lm = self.model.causal_lm
        self.examples, self.end_token_ids, fingerprint = prepare_examples(
            data, self, Path(run_dir) / "tokens"
        )
        self._data_key = f"{fingerprint}-{hash_examples(self.examples)}"
        engine = self.engine = self.engine or KerasEngine(
            causal_lm,
            end_token_ids=self.end_token_ids,
            max_new_tokens=self.max_response_length,
        )
        check_engine(engine, self)
        # Few shapes, the same in all iterations.
        lengths = np.array([len(e.prompt_ids) for e in self.examples])
        self.bucket_lengths = choose_bucket_lengths(
            lengths + [len(e.response_ids) for e in self.examples],
            longest=int(lengths.max()) + self.max_response_length,
        )
        self.folder = RunDir(run_dir)
        self._best = Best(self.folder.path, self.keep_best, self.score_modes)
        # Early, so that nobody waits in vain; `run` asks again.
        if not from_first(self.folder.is_new):
            self._hash = WeightsHash(causal_lm)
            self.folder.join(self._describe())
            if self.control is not None:
                Control(self, self.folder).check()
        self.opponent = Opponent(self, engine, self.folder)

    @property
    def num_steps(self) -> int:
        """Batches of the whole run, which learning-rate schedules count."""
        return self._num_steps(self.iterations)

    def _num_steps(self, iterations: int) -> int:
        steps = -(-self.num_pairs // self.batch_size)
        return steps * self.epochs * iterations

    def run(self) -> Path:
        """Runs all iterations that aren't done yet.

        Returns:
            The run's folder.

        Raises:
            FloatingPointError: A log-prob or weight is NaN or infinite; the
                checkpoint on disk is older than that.
            MemoryError: A training step doesn't fit into memory.
            SystemExit: SIGTERM came; there is a checkpoint.
            ValueError: Another process runs in the folder, or what is there
                is damaged and can't be made again.
        """
        self.check_model()
        has_control = self.control is not None
        control = Control(self, self.folder) if has_control else None
        if self.compilation_cache is not None:
            folder = Path(self.compilation_cache).expanduser()
            backend.cache_compilations(folder)
        self._hash = WeightsHash(self.model.causal_lm)
        self._termination = Termination()
        with self._termination.handled(), self.folder.open(self._describe):
            try:
                is_over = self._run(control)
                self.folder.checkpoints.wait()
            finally:
                self._notify("on_run_end", {})
        if is_over and control is not None:
            print(f"Control: {type(control.loss).__name__} in the same steps")
            try:
                with control.in_place() as arguments:
                    SelfPlay(
                        self.model, self.examples, control.path, **arguments
                    ).run()
            finally:
                self.folder.checkpoints.load(state_of(self.model))
        return self.folder.path

    def best(self) -> dict[str, Any]:
        """Of which iteration `keep_best` has kept the weights.

        It is the best of those that were evaluated since the folder's runs
        have kept the best in that score.

        Returns:
            `{"score", "mode", "iteration", "value"}`; iteration 0 is before
            self-play.

        Raises:
            ValueError: None are kept.
        """
        return self._best.read()

    def load_best(self) -> dict[str, Any]:
        """Gives the model the weights that `keep_best` has kept.

        Returns:
            As `best`.

        Raises:
            ValueError: None are kept, or the file is damaged.
        """
        return self._best.read(self.model.trainable_variables)

    def _describe(self) -> Manifest:
        """What the run is, with the model as it is."""
        return {
            "title": self.title,
            "score_modes": dict(self.score_modes or {}),
            "commit": getattr(self.model.causal_lm, "commit", None),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "settings": {
                "data": self._data_key,
                **result_settings(self),
                "weights": self._hash(),
            },
            "execution": execution_settings(self),
            "versions": versions(),
        }

    def _run(self, control: Control | None) -> bool:
        """Runs all iterations; false where a callback stops training."""
        self.model.add_metrics(self_play_metrics())
        for callback in self.callbacks:
            callback.set_model(self.model)
        from_first(self._best.check)
        self._alarms = Alarms(
            self.folder.log.write, read_metrics(self.folder.path)
        )
        if control is not None:
            control.keep_start(self._hash())
        position = self._begin()
        while position["iteration"] <= self.iterations:
            try:
                is_whole = self._run_iteration(position)
            except LostShard as error:
                position = self._go_back(position, error)
                continue
            if not is_whole:
                print("Stopped by a callback; `run` goes on from here.")
                return False
            position = _start(position["iteration"] + 1)
        return True

    def _begin(self) -> Position:
        """Where the run goes on, or the start of a new one."""
        variables = self.model.trainable_variables
        optimizer = self.model.optimizer
        is_used = optimizer.built
        if not is_used:  # one that scales losses would take them twice
            with self.model.device_scope():
                optimizer.build(variables)
        position = self.folder.checkpoints.load(state_of(self.model))
        if position is None:
            # Nothing of another run of this model is left.
            self.model.reset_order()
            if is_used:
                self._reset_optimizer()
            scores = self._evaluate(0)
            if scores:
                print(_line(0, scores))
            position = _start(1)
            self._save(position)
        return position

    def _reset_optimizer(self) -> None:
        """Gives the optimizer the state of a new one; its rate stays."""
        new = new_optimizer(self.model)
        with self.model.device_scope():
            new.build(self.model.trainable_variables)
        old = self.model.optimizer.variables
        for variable, fresh in zip(old, new.variables, strict=True):
            variable.assign(fresh)

    def _go_back(self, position: Position, error: LostShard) -> Position:
        """The start of an iteration, where lost shards can be made again."""
        start = self.folder.checkpoints.load(state_of(self.model), is_back=True)
        if start is None:
            raise error
        warnings.warn(
            f"Iteration {start['iteration']} starts again: {error}",
            stacklevel=4,
        )
        return start

    def _run_iteration(self, position: Position) -> bool:
        """Runs the rest of an iteration; false where a callback stops it."""
        iteration = position["iteration"]
        self._notify("on_iteration_begin", iteration, {})
        # Shards of a half-trained iteration are the opponent's, which the
        # weights in memory are not any more: their key is in the checkpoint.
        key = position.get("key") or f"{self._data_key}-{self._hash()}"
        timing: dict[str, float] = {}
        dataset = self._make_pairs(position, key, timing)
        means = {}
        if position["epoch"] < self.epochs:

            def save(new: Position) -> None:
                self._save({**new, "key": key})

            real = sum(len(example.response_ids) for example in self.examples)
            self._alarms.begin(
                iteration,
                self._num_steps(iteration - 1),
                (real * self.num_samples, int(timing["generated_tokens"])),
            )
            training = Training(
                self,
                dataset,
                position,
                self.folder.log.write,
                self._alarms,
                self._termination,
                save,
            )
            start = time.perf_counter()
            if not training.run():
                self._termination.check()
                return False
            seconds = time.perf_counter() - start
            tokens_per_second = training.steps.num_tokens / seconds
            timing["fit_seconds"] = round(seconds, 3)
            timing["tokens_per_second"] = round(tokens_per_second, 1)
            means = training.steps.means()
            self.folder.log.write("iteration", iteration=iteration, **timing)
            if tokenizer := getattr(self.model.causal_lm, "tokenizer", None):
                lines = training.steps.rows.lines(dataset, tokenizer)
                self.folder.log.write_texts("weights", iteration, lines)
            save({**position, "epoch": self.epochs, "batch": 0})
            self._termination.check()
        scores = self._evaluate(iteration)
        self._notify("on_iteration_end", iteration, scores | timing)
        print(_line(iteration, scores | means | timing))
        self._save(_start(iteration + 1))
        return True

    def _make_pairs(
        self, position: Position, key: str, timing: dict[str, float]
    ) -> PairDataset:
        """The pairs of an iteration; adds to `timing` what they took."""
        iteration, is_started = position["iteration"], "key" in position
        start = time.perf_counter()
        answers = self.opponent.answer(iteration, key, is_over=is_started)
        responses = [ids for shard in answers for ids in shard.responses]
        generated = time.perf_counter()
        num_tokens = np.array([len(ids) for ids in responses])
        timing["generate_seconds"] = round(generated - start, 3)
        timing["generated_tokens"] = int(num_tokens.sum())
        if not is_started:
            self._notify("on_generate_end", iteration, responses, timing)
        proto_synthetic = self.opponent.first_responses(iteration)
        log_probs = self.opponent.score(
            iteration,
            key,
            answers,
            proto_synthetic=proto_synthetic,
            is_over=is_started,
        )
        timing["score_seconds"] = round(time.perf_counter() - generated, 3)
        if not is_started:
            pairs = self._pairs(log_probs, num_tokens)
            self._notify("on_score_end", iteration, pairs, timing)
        return PairDataset(
            self.examples,
            responses,
            log_probs,
            batch_size=self.batch_size,
            num_samples=self.num_samples,
            proto_synthetic=proto_synthetic,
            bucket_lengths=self.bucket_lengths,
            seed=combine_seeds(self.seed, iteration),
        )

    def _pairs(
        self, log_probs: np.ndarray, num_synthetic_tokens: np.ndarray
    ) -> PairBatch:
        """All pairs of an iteration as it starts."""
        real = np.repeat(
            [len(example.response_ids) for example in self.examples],
            self.num_samples,
        )
        log_probs = log_probs[:, :2].astype("float64")
        return PairBatch(
            opponent=log_probs,
            policy=log_probs,
            num_tokens=np.stack([real, num_synthetic_tokens], axis=1),
            sample_weight=np.ones(len(log_probs)),
            num_samples=self.num_samples,
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
        scores = self.folder.log.write_scores(
            scores,
            iteration=iteration,
            step=self._num_steps(iteration),
            seconds=round(time.perf_counter() - start, 3),
        )
        self._best.keep(
            self.model.trainable_variables, iteration, scores, self._hash
        )
        return scores

    def _save(self, position: Position) -> None:
        is_start = position["epoch"] == position["batch"] == 0
        self.folder.checkpoints.save(
            state_of(self.model),
            position,
            **({"weights": self._hash()} if is_start else {}),
        )


def _start(iteration: int) -> Position:
    return {"iteration": iteration, "epoch": 0, "batch": 0}


def _line(iteration: int, values: dict[str, float]) -> str:
    numbers = ", ".join(f"{name} {v:.4g}" for name, v in values.items())
    return f"Iteration {iteration}: {numbers}"
