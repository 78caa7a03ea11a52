"""What an iteration learns from: the opponent's responses and log-probs."""

import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from keras_iris import backend
from keras_iris.data import Example
from keras_iris.files import hash_arrays
from keras_iris.generation import Completion, Engine, check_log_probs
from keras_iris.hub import export, save_adapter
from keras_iris.models.score import TokenScorer, score_pairs
from keras_iris.self_play.arrays import (
    Arrays,
    read_responses,
    split_responses,
)
from keras_iris.self_play.engine_checks import check_completions
from keras_iris.self_play.options import Options
from keras_iris.self_play.processes import is_first
from keras_iris.self_play.run_dir import RunDir
from keras_iris.self_play.seeds import combine_seeds

# Prompts of a shard, and their seed.
Request = tuple[list[np.ndarray], int]


class Answers(NamedTuple):
    """A shard of the responses of an iteration.

    Attributes:
        first: Number of its first response.
        examples: Prompts and annotated responses, each as often as it has
            synthetic ones.
        responses: Token ids of a synthetic response to each prompt.
        engine_log_probs: What the engine says of them, in nats, shape
            `(responses,)`; NaN where it says nothing.
    """

    first: int
    examples: list[Example]
    responses: list[np.ndarray]
    engine_log_probs: np.ndarray


class Opponent:
    """The model as an iteration starts, which answers the prompts.

    It keeps what it gives in shards of the run's folder, and reads those
    that are there.

    Args:
        options: Of the run, with its model and examples. An iteration that has
            begun keeps its own `shard_size`.
        engine: What generates.
        folder: The run's folder.
    """

    def __init__(
        self, options: Options, engine: Engine, folder: RunDir
    ) -> None:
        self.options = options
        self.model = options.model
        self.engine = engine
        self.folder = folder
        self._score_tokens = TokenScorer(options.model)

    def answer(
        self, iteration: int, key: str, *, is_over: bool
    ) -> list[Answers]:
        """Answers all prompts; returns the responses shard by shard.

        An engine gets a prompt as often as it has to be answered.

        Args:
            iteration: Number of the iteration.
            key: Names the weights and the data.
            is_over: Whether training has begun, and the model's weights are
                the opponent's no more: then all shards have to be there.
        """
        copies = range(self.options.num_samples)
        examples = [e for e in self.options.examples for _ in copies]
        name = f"iteration_{iteration:03d}/synthetic"
        size = self.folder.shard_size(name, key) or self.options.shard_size
        starts = range(0, len(examples), size)
        parts = [examples[start : start + size] for start in starts]
        requests: list[Request] = [
            (
                [example.prompt_ids for example in part],
                combine_seeds(self.options.seed, iteration, number),
            )
            for number, part in enumerate(parts)
        ]

        is_outside = self.engine.reads != "trainer"

        def make(numbers: list[int]) -> Generator[Arrays, None, None]:
            if is_outside:
                self._update_engine()
            if not numbers:
                return
            answers: Any = iter(
                self.engine.generate_shards(requests[n] for n in numbers)
            )
            # Engines may have asked for more than was taken.
            total = sum(len(parts[number]) for number in numbers)
            with (
                closing(answers)
                if hasattr(answers, "close")
                else nullcontext(),
                _progress(total, "answers") as progress,
            ):
                for number in numbers:
                    completions: Any = next(answers, None)
                    check_completions(
                        type(self.engine).__name__,
                        completions,
                        self.options,
                        num_prompts=len(parts[number]),
                        first=starts[number],
                    )
                    # By all processes together it is done in `score`.
                    if is_outside and backend.process_count() == 1:
                        self._check_tokens(
                            iteration, completions, parts[number]
                        )
                    progress.update(len(completions))
                    yield _arrays(completions)

        print(name)
        shards = self.folder.shards(
            name,
            [key] * len(parts),
            size=size,
            make=None if is_over else make,
            by_first=is_outside,
        )
        return [
            Answers(first, part, split_responses(shard), shard["log_probs"])
            for first, part, shard in zip(starts, parts, shards, strict=True)
        ]

    def score(
        self,
        iteration: int,
        key: str,
        answers: Sequence[Answers],
        *,
        proto_synthetic: Sequence[np.ndarray] | None,
        is_over: bool,
    ) -> np.ndarray:
        """Log-probs of all responses of each pair, in nats.

        They are of what `answer` and `first_responses` gave, with the same
        arguments.

        Returns:
            Array of shape `(pairs, 2)`, or `(pairs, 3)` with proto-synthetic
            responses.
        """

        def part(shard: Answers) -> Sequence[np.ndarray] | None:
            end = shard.first + len(shard.responses)
            return proto_synthetic and proto_synthetic[shard.first : end]

        def make(numbers: list[int]) -> Generator[Arrays, None, None]:
            total = sum(len(answers[number].responses) for number in numbers)
            with _progress(total, "pairs") as progress:
                for number in numbers:
                    shard = answers[number]
                    log_probs = score_pairs(
                        self.model,
                        shard.examples,
                        shard.responses,
                        batch_size=self._rows_at_once,
                        bucket_lengths=self.options.bucket_lengths,
                        proto_synthetic=part(shard),
                    )
                    self._check_finite(log_probs, shard.first)
                    progress.update(len(log_probs))
                    yield {"log_probs": log_probs}

        name = f"iteration_{iteration:03d}/opponent"
        print(name)
        shards = self.folder.shards(
            name,
            # Scores are of these responses, and of no others.
            [
                f"{key}-{_hash([*shard.responses, *(part(shard) or [])])}"
                for shard in answers
            ],
            size=len(answers[0].examples),
            make=None if is_over else make,
        )
        log_probs = np.concatenate([shard["log_probs"] for shard in shards])
        given = np.concatenate([shard.engine_log_probs for shard in answers])
        num_tokens = np.array([len(i) for s in answers for i in s.responses])
        # NaN where the engine doesn't tell; it has given no other.
        is_given = np.isfinite(given)
        if is_given.any():
            self._compare(
                iteration,
                given[is_given],
                log_probs[is_given, 1],
                num_tokens[is_given],
            )
        return log_probs

    def first_responses(self, iteration: int) -> list[np.ndarray] | None:
        """The responses of iteration 1, where the loss learns from them.

        Args:
            iteration: The present one: there are none in the first.

        Raises:
            ValueError: They aren't all in the run's folder any more.
        """
        options = self.options
        if iteration == 1 or options.model.loss.max_responses < 3:
            return None
        return read_responses(self.folder.path, 1, options.num_pairs)

    @property
    def _rows_at_once(self) -> int:
        """A forward pass has room where a training step has."""
        return self.model.micro_batch_size or self.options.batch_size

    def _check_finite(self, log_probs: np.ndarray, first: int) -> None:
        bad = first + np.flatnonzero(~np.isfinite(log_probs).all(axis=1))
        if len(bad):
            examples = np.unique(bad // self.options.num_samples).tolist()
            raise FloatingPointError(
                f"The log-probs of examples {examples} are not finite, under "
                "the model as the iteration starts. Check its weights and "
                "dtype, and these rows of the data."
            )

    def _compare(self, iteration: int, *values: np.ndarray) -> None:
        """Compares log-probs of engine and trainer, and logs how they differ.

        What an engine in another process reads was rounded to bfloat16.
        """
        dtype = self.model.causal_lm.backbone.compute_dtype
        difference = check_log_probs(
            *values,
            dtype=dtype if self.engine.reads == "trainer" else "bfloat16",
            max_difference_nats=self.engine.max_difference_nats,
        )
        self.folder.log.write(
            "engine", iteration=iteration, nats_per_token=difference
        )

    def _check_tokens(
        self,
        iteration: int,
        completions: list[Completion],
        examples: list[Example],
    ) -> None:
        """Compares log-probs token by token, in as many as fit in a batch.

        That an engine in this process, with the trainer's own variables, is
        out of step shows in the sums of all completions already.
        """
        pairs = [
            (example, np.array(completion.token_ids, "int32"), given)
            for completion, example in zip(completions, examples, strict=True)
            if (given := completion.log_probs) is not None
        ][: self._rows_at_once]
        if not pairs:
            warnings.warn(
                f"{type(self.engine).__name__} gives no log-probs: whether it "
                "has the model's weights and prompts can't be checked.",
                stacklevel=2,
            )
            return
        kept, ids, given = zip(*pairs, strict=True)
        scores = self._score_tokens(list(kept), ids)
        self._compare(iteration, np.concatenate(given), np.concatenate(scores))

    def _update_engine(self) -> None:
        """Gives an engine outside of this process the current weights.

        All processes take part in writing them, and process 0 has the engine.
        """
        reads = self.engine.reads
        path = self.folder.path / reads
        print(f"Writing the {reads} to {path}")
        write = export if reads == "export" else save_adapter
        folder = write(self.model.causal_lm, path)
        if is_first():
            self.engine.update(folder)


@contextmanager
def _progress(total: int, unit: str) -> Iterator[Any]:
    """A bar where somebody looks at it, and then what was done a second."""
    start = time.perf_counter()
    with tqdm(total=total, unit=f" {unit}", leave=False, disable=None) as bar:
        yield bar
    speed = total / (time.perf_counter() - start)
    print(f"{total:,} {unit}, {speed:.3g} a second")


def _arrays(completions: Sequence[Completion]) -> Arrays:
    """A shard of responses, and the engine's log-probs of them."""
    log_probs = [
        np.nan if c.log_probs is None else np.sum(c.log_probs)
        for c in completions
    ]
    ids = [completion.token_ids for completion in completions]
    return {
        "lengths": np.array([len(i) for i in ids], "int32"),
        "token_ids": np.concatenate(ids).astype("int32"),
        "log_probs": np.array(log_probs, "float32"),
    }


def _hash(responses: list[np.ndarray]) -> str:
    lengths = np.array([len(ids) for ids in responses])
    arrays = {"ids": np.concatenate(responses), "lengths": lengths}
    return hash_arrays(arrays)[:16]
