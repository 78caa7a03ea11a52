"""Who generates in `generation.py`: `KerasEngine` and `transformers`."""

import time

import harness
import models
import numpy as np

BATCH_SIZE = 32
LOG_DEVIATION, LONGEST = 0.6, 1_024
IDS_PER_END = 64
# Batches have to stop early for steps to be wasted.
IDS_PER_END_OF_COUNTS = 4


def random_prompts(number, mean_length, vocabulary, seed=0):
    """Prompts of log-normal lengths."""
    lengths = prompt_lengths(number, mean_length, seed)
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def prompt_lengths(number, mean_length, seed=0):
    """Log-normal lengths, rounded."""
    centre = np.log(mean_length) - LOG_DEVIATION**2 / 2
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(centre, LOG_DEVIATION, number)
    return np.clip(lengths.round().astype(int), 4, LONGEST)


def end_token_ids(vocabulary, ids_per_end=IDS_PER_END):
    """Every 64th id, or another share of all."""
    return list(range(0, vocabulary, ids_per_end))


class Keras:
    """`KerasEngine` on `KERAS_BACKEND`.

    Args:
        folder: Of the model.
        vocabulary: Number of ids.
        max_new_tokens: Of an answer.
    """

    def __init__(self, folder, vocabulary, max_new_tokens):
        import keras_iris

        self.engine = keras_iris.generation.KerasEngine(
            keras_iris.load(folder, dtype="float32"),
            end_token_ids=end_token_ids(vocabulary),
            max_new_tokens=max_new_tokens,
            batch_size=BATCH_SIZE,
        )

    def run(self, prompts, seed):
        """Seconds, useful tokens and peak memory of one `generate`."""
        harness.reset_peak()
        start = time.perf_counter()
        answers = self.engine.generate(prompts, seed=seed)
        return _answer(start, [len(a.token_ids) for a in answers])


class Counter:
    """Counts the decode steps of `KerasEngine`.

    On JAX, whose compiled steps can call Python.

    Args:
        max_new_tokens: Of an answer.
    """

    def __init__(self, max_new_tokens):
        import keras_iris

        self.vocabulary = models.TINY["vocabulary"]
        self.engine = keras_iris.generation.KerasEngine(
            models.keras_model(models.TINY),
            end_token_ids=end_token_ids(self.vocabulary, IDS_PER_END_OF_COUNTS),
            max_new_tokens=max_new_tokens,
            batch_size=BATCH_SIZE,
        )
        self.calls = 0
        self._count_steps(self.engine._decoder.forward)

    def _count_steps(self, forward):
        import jax

        step = forward.step

        def counted(*arguments):
            jax.debug.callback(self._count)
            return step(*arguments)

        forward.step = counted

    def _count(self):
        self.calls += 1

    def count_steps(self, number, mean_length):
        """Decode steps made, and those of rows that are never idle.

        And, for comparison, of batches that wait for their longest answers.
        """
        import jax

        prompts = random_prompts(number, mean_length, self.vocabulary)
        self.calls = 0
        answers = self.engine.generate(prompts, seed=0)
        jax.effects_barrier()
        lengths = np.array([len(answer.token_ids) for answer in answers])
        sizes = [len(prompt) for prompt in prompts]

        def total(waves, steps_of):
            plan = self._plan(sizes, waves)
            return int(sum(steps_of(lengths[list(b.indices)]) for b in plan))

        return {
            "prompts": number,
            "made": self.calls,
            "fewest": total(
                self.engine._decoder.waves,
                lambda own: max(own.max(), -(-own.sum() // BATCH_SIZE)),
            ),
            "waiting": total(1, np.max),
        }

    def _plan(self, lengths, waves):
        from keras_iris.generation import batch_plan

        buckets = batch_plan.DEFAULT_BUCKET_LENGTHS
        num_rows = dict.fromkeys(buckets, BATCH_SIZE)
        return batch_plan.plan_prompts(lengths, num_rows, waves)

    def compiled_lengths(self, number, mean_length):
        """The lengths that so many prompts are padded to."""
        waves = self.engine._decoder.waves
        batches = self._plan(prompt_lengths(number, mean_length), waves)
        return sorted({batch.bucket_length for batch in batches})


class TransformersModel:
    """`transformers.generate` with padding on the left.

    Args:
        model: One of transformers.
        ends: Ids that end an answer.
        max_new_tokens: Of an answer.
    """

    def __init__(self, model, ends, max_new_tokens):
        import torch
        import transformers

        self.torch, self.model, self.ends = torch, model.eval(), ends
        self.config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=1,
        )

    def answer(self, prompts, batch_size):
        """The length of each answer."""
        lengths = []
        for first in range(0, len(prompts), batch_size):
            lengths += self._generate(prompts[first : first + batch_size])
        return lengths

    def _generate(self, prompts):
        torch = self.torch
        longest = max(len(prompt) for prompt in prompts)
        token_ids = torch.ones((len(prompts), longest), dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for row, prompt in enumerate(prompts):
            token_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            result = self.model.generate(
                token_ids, attention_mask=mask, generation_config=self.config
            )
        new = result[:, longest:].cpu().numpy()
        is_end = np.isin(new, self.ends)
        stops = np.where(
            is_end.any(axis=1), is_end.argmax(axis=1) + 1, new.shape[1]
        )
        return stops.tolist()


class Transformers(TransformersModel):
    """The same for a folder."""

    def __init__(self, folder, vocabulary, max_new_tokens):
        import torch
        import transformers

        model = transformers.Qwen2ForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        super().__init__(model, end_token_ids(vocabulary), max_new_tokens)

    def run(self, prompts, seed, is_sorted=False):
        """Seconds, useful tokens and peak memory of all batches."""
        self.torch.manual_seed(seed)
        harness.reset_peak()
        start = time.perf_counter()
        if is_sorted:
            prompts = sorted(prompts, key=len)
        return _answer(start, self.answer(prompts, BATCH_SIZE))


class Exporter:
    """Writes the model that all contestants read."""

    def __init__(self, folder, sizes):
        import keras

        import keras_iris

        keras.utils.set_random_seed(0)
        causal_lm = models.keras_model(sizes)
        keras_iris.export(causal_lm, folder, dtype="float32")
        # `load` wants one; the prompts are ids already.
        models.number_tokenizer(sizes["vocabulary"]).save_pretrained(folder)


def _answer(start, lengths):
    seconds = time.perf_counter() - start
    return {
        "seconds_per_token": seconds / sum(lengths),
        "mean_length": float(np.mean(lengths)),
        "peak_mb": harness.peak_mb(),
    }
