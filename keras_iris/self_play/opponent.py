"""What an iteration learns from: the opponent's responses and log-probs."""

import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_iris.data import Example
from keras_iris.generation import Completion, Engine, check_log_probs
from keras_iris.hub import export, save_adapter
from keras_iris.models import SelfPlayModel, TokenScorer, score_pairs
from keras_iris.self_play.arrays import Arrays, hash_arrays
from keras_iris.self_play.run_dir import RunDir
from keras_iris.self_play.seeds import combine_seeds


class Opponent:
    """The model as an iteration starts, which answers the prompts.

    It keeps what it gives in shards of the run's folder, and reads those
    that are there.

    Args:
        model: The model.
        engine: What generates.
        examples: Prompts and annotated responses.
        folder: The run's folder.
        end_token_ids: Ids that end a response.
        batch_size: Pairs that are scored at a time.
        bucket_lengths: Lengths that pairs are padded to.
        max_response_length: The longest response, in tokens.
        shard_size: Responses of a file; an iteration that has begun keeps its
            own.
        seed: Seed of the sampling.
    """

    def __init__(  # noqa: PLR0913 (by keyword only)
        self,
        model: SelfPlayModel,
        engine: Engine,
        examples: list[Example],
        folder: RunDir,
        *,
        end_token_ids: tuple[int, ...],
        batch_size: int,
        bucket_lengths: tuple[int, ...],
        max_response_length: int,
        shard_size: int,
        seed: int,
    ) -> None:
        self.model = model
        self.engine = engine
        self.folder = folder
        self.end_token_ids = end_token_ids
        self.batch_size = batch_size
        self.bucket_lengths = bucket_lengths
        self.max_response_length = max_response_length
        self.seed = seed
        self.examples = examples
        self.shard_size = shard_size
        self._is_over = False
        self._is_updated = False
        self._score_tokens = TokenScorer(model)
        self._shards: list[list[Example]] = []

    def answer(
        self, iteration: int, key: str, *, is_over: bool
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Answers all prompts.

        Args:
            iteration: Number of the iteration.
            key: Names the weights and the data.
            is_over: Whether training has begun, and the model's weights are
                the opponent's no more: then all shards have to be there.

        Returns:
            The responses' token ids, and the engine's log-probs of them in
            nats, NaN where it gives none.

        Raises:
            LostShard: A shard is lost that can't be made again.
            ValueError: The engine has another model than the trainer, or
                answers what can't be used.
        """
        self._is_over = is_over
        self._is_updated = False
        size = self.folder.shard_size(_folder(iteration, "synthetic"), key)
        size = size or self.shard_size
        self._shards = [
            self.examples[start : start + size]
            for start in range(0, len(self.examples), size)
        ]
        return self._generate(iteration, key)

    def score(
        self,
        iteration: int,
        key: str,
        responses: list[np.ndarray],
        engine_log_probs: np.ndarray,
    ) -> np.ndarray:
        """Scores annotated and synthetic responses, after `answer`.

        Args:
            iteration: Number of the iteration.
            key: Names the weights and the data.
            responses: What `answer` gave.
            engine_log_probs: What `answer` gave.

        Returns:
            Log-probs of shape `(examples, 2)`, in nats.

        Raises:
            FloatingPointError: A log-prob is not finite.
            LostShard: A shard is lost that can't be made again.
            ValueError: The engine has another model than the trainer.
        """
        log_probs = self._score(iteration, key, responses)
        num_tokens = np.array([len(ids) for ids in responses])
        # NaN where the engine doesn't tell; `_check` takes no other.
        is_given = np.isfinite(engine_log_probs)
        if is_given.any():
            self._compare(
                iteration,
                engine_log_probs[is_given],
                log_probs[is_given, 1],
                num_tokens[is_given],
            )
        return log_probs

    @property
    def _rows_at_once(self) -> int:
        """A forward pass has room where a training step has."""
        return self.model.micro_batch_size or self.batch_size

    def _generate(
        self, iteration: int, key: str
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Responses, and the engine's log-probs of them."""
        answers, next_number = self._ask(iteration, 0), 0

        def make(number: int) -> Arrays:
            nonlocal answers, next_number
            if number != next_number:  # those before it were there
                answers.close()
                answers = self._ask(iteration, number)
            next_number = number + 1
            completions: Any = next(answers, None)
            self._check(completions, number)
            if self.engine.reads != "trainer":
                self._check_tokens(iteration, completions, number)
            ids = [completion.token_ids for completion in completions]
            log_probs = [
                np.nan if c.log_probs is None else np.sum(c.log_probs)
                for c in completions
            ]
            return {
                "lengths": np.array([len(i) for i in ids], "int32"),
                "token_ids": np.concatenate(ids).astype("int32"),
                "log_probs": np.array(log_probs, "float32"),
            }

        try:
            shards = self._read_or_make(
                iteration, "synthetic", lambda _: key, make
            )
        finally:
            answers.close()
        responses = [
            ids
            for shard in shards
            for ids in np.split(
                shard["token_ids"], np.cumsum(shard["lengths"])[:-1]
            )
        ]
        return responses, np.concatenate([s["log_probs"] for s in shards])

    def _ask(self, iteration: int, first: int) -> Generator[Any, None, None]:
        """Asks for a shard and those behind it up to one that is there."""
        if not self._is_updated:
            self._update_engine()
            self._is_updated = True
        numbers = [first]
        for number in range(first + 1, len(self._shards)):
            if self.folder.has_shard(_folder(iteration, "synthetic"), number):
                break
            numbers.append(number)
        yield from self.engine.generate_shards(
            (
                [example.prompt_ids for example in self._shards[number]],
                combine_seeds(self.seed, iteration, number),
            )
            for number in numbers
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
        self.folder.log(
            "engine", iteration=iteration, nats_per_token=difference
        )

    def _check(self, completions: Any, number: int) -> None:
        """Refuses what an engine may not give back for a shard."""
        engine = type(self.engine).__name__
        num_prompts = len(self._shards[number])
        first = sum(len(shard) for shard in self._shards[:number])
        if (
            not isinstance(completions, list | tuple)
            or len(completions) != num_prompts
            or not all(isinstance(c, Completion) for c in completions)
        ):
            raise ValueError(
                f"{engine}.generate has to give a list with one `Completion` "
                f"for each of the {num_prompts} prompts. Received: "
                f"{str(completions)[:80]}"
            )
        size = self.model.causal_lm.backbone.token_embedding.input_dim
        for i, completion in enumerate(completions, first):
            ids = completion.token_ids
            if len(ids) > self.max_response_length:
                raise ValueError(
                    f"Completion {i} of {engine} has {len(ids)} tokens, more "
                    f"than max_response_length={self.max_response_length}. "
                    "Give the engine that limit, or raise it."
                )
            if not ids or min(ids) < 0 or max(ids) >= size:
                raise ValueError(
                    f"Completion {i} of {engine} has to be ids below {size}, "
                    f"the model's vocabulary. Received: {ids}. Give the engine "
                    "the model's own tokenizer and weights."
                )
            if set(ids[:-1]) & set(self.end_token_ids):
                raise ValueError(
                    f"Completion {i} of {engine} goes on after an end token, "
                    f"one of {self.end_token_ids}. Received: {ids}. Cut it "
                    "behind the first."
                )
            given = completion.log_probs
            if given is not None and (
                np.shape(given) != (len(ids),) or not np.isfinite(given).all()
            ):
                raise ValueError(
                    f"The log-probs of completion {i} of {engine} have to be "
                    f"{len(ids)} finite numbers, or None. Received: {given}"
                )

    def _check_tokens(
        self, iteration: int, completions: list[Completion], number: int
    ) -> None:
        """Compares log-probs token by token, in as many as fit in a batch.

        That an engine in this process, with the trainer's own variables, is
        out of step shows in the sums of all completions already.
        """
        pairs = [
            (completion, example)
            for completion, example in zip(
                completions, self._shards[number], strict=True
            )
            if completion.log_probs is not None
        ][: self._rows_at_once]
        if not pairs:
            warnings.warn(
                f"{type(self.engine).__name__} gives no log-probs: whether it "
                "has the model's weights and prompts can't be checked.",
                stacklevel=2,
            )
            return
        scores = self._score_tokens(
            [example for _, example in pairs],
            [np.array(c.token_ids, "int32") for c, _ in pairs],
        )
        given = [c.log_probs for c, _ in pairs if c.log_probs is not None]
        self._compare(iteration, np.concatenate(given), np.concatenate(scores))

    def _score(
        self, iteration: int, key: str, responses: list[np.ndarray]
    ) -> np.ndarray:
        """Log-probs of both responses, `(examples, 2)`."""
        starts = np.cumsum([0] + [len(shard) for shard in self._shards])

        def key_of(number: int) -> str:
            """Scores are of these responses, and of no others."""
            own = responses[starts[number] : starts[number + 1]]
            lengths = np.array([len(ids) for ids in own])
            ids = np.concatenate(own)
            return f"{key}-{hash_arrays({'ids': ids, 'lengths': lengths})[:16]}"

        def make(number: int) -> Arrays:
            first, end = starts[number], starts[number + 1]
            log_probs = score_pairs(
                self.model,
                self._shards[number],
                responses[first:end],
                batch_size=self._rows_at_once,
                bucket_lengths=self.bucket_lengths,
            )
            _check_finite(log_probs, np.arange(first, end))
            return {"log_probs": log_probs}

        shards = self._read_or_make(iteration, "opponent", key_of, make)
        return np.concatenate([shard["log_probs"] for shard in shards])

    def _read_or_make(
        self,
        iteration: int,
        kind: str,
        key_of: Callable[[int], str],
        make: Callable[[int], Arrays],
    ) -> list[Arrays]:
        """All shards of one kind; key and content follow from the number."""
        verb = {"synthetic": "generate", "opponent": "score"}[kind]
        print(f"Iteration {iteration}: {verb}")
        progress = keras.utils.Progbar(len(self._shards), unit_name="shard")
        shards = []
        for number in range(len(self._shards)):
            shards.append(
                self.folder.shard(
                    _folder(iteration, kind),
                    number,
                    key=key_of(number),
                    size=len(self._shards[0]),
                    make=None if self._is_over else partial(make, number),
                )
            )
            progress.update(number + 1)
        return shards

    def _update_engine(self) -> None:
        """Gives an engine outside of this process the current weights."""
        reads = self.engine.reads
        if reads == "trainer":
            return
        path = self.folder.path / reads
        print(f"Writing the {reads} to {path}")
        write = export if reads == "export" else save_adapter
        self.engine.update(write(self.model.causal_lm, path))


def _folder(iteration: int, kind: str) -> str:
    """Where shards are within the run's folder."""
    return f"iteration_{iteration:03d}/{kind}"


def check_engine(
    engine: Any,
    causal_lm: keras.Model,
    *,
    end_token_ids: tuple[int, ...],
    max_response_length: int,
) -> None:
    """Refuses what isn't an engine, or doesn't sample from the model.

    Args:
        engine: What is to generate.
        causal_lm: The model.
        end_token_ids: Ids that end a response.
        max_response_length: The longest response, in tokens.

    Raises:
        ValueError: It isn't a `keras_iris.generation.Engine`, reads weights
            in floats where the model computes in int8, or is set to sample
            otherwise, to other ends or to longer responses.
    """
    if not isinstance(engine, Engine):
        raise ValueError(
            "`engine` has to be an object of `KerasEngine`, `ServerEngine` or "
            "a subclass of one's own of `keras_iris.generation.Engine`. "
            f"Received: {engine!r}"
        )
    # Keras (3.15) rounds the inputs of int8 layers, too, not those of int4. It
    # has no public way to all layers.
    lossy = {"trainer": (), "export": ("int8",), "adapter": ("int8", "int4")}
    for layer in causal_lm._flatten_layers():
        mode = getattr(layer, "quantization_mode", None)
        if mode in lossy[engine.reads]:
            raise ValueError(
                f"{type(engine).__name__} reads each iteration's "
                f"{engine.reads} and computes in floats, the model that "
                f"trains in {mode}: their log-probs differ. Load the model "
                "with `quantize='int4'` and let the engine read exports, or "
                "without, or use `KerasEngine`."
            )
    config = engine.get_config()
    ends = config.get("end_token_ids", end_token_ids)
    if set(ends) != set(end_token_ids):
        raise ValueError(
            f"{type(engine).__name__} ends responses with {tuple(ends)}, the "
            f"data with {end_token_ids}. Give the engine the data's."
        )
    most = config.get("max_new_tokens", max_response_length)
    if most > max_response_length:
        raise ValueError(
            f"{type(engine).__name__} answers with up to {most} tokens, more "
            f"than max_response_length={max_response_length}. Lower the one "
            "or raise the other."
        )
    sampler = config.get("sampler", "RandomSampler")
    temperature = config.get("sampler.temperature", 1.0)
    if sampler != "RandomSampler" or temperature != 1.0:
        raise ValueError(
            "Self-play needs samples of the model itself, from "
            "`RandomSampler(temperature=1.0)`. Received an engine with "
            f"{sampler}(temperature={temperature})."
        )


def _check_finite(log_probs: np.ndarray, indices: np.ndarray) -> None:
    bad = indices[~np.isfinite(log_probs).all(axis=1)]
    if len(bad):
        raise FloatingPointError(
            f"The log-probs of examples {bad.tolist()} are not finite, "
            "under the model as the iteration starts. Check its weights and "
            "dtype, and these rows of the data."
        )
