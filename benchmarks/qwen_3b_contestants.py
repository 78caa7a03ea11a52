"""Who answers and who trains in `qwen_3b.py`."""

import time
from pathlib import Path

import generation_contestants
import harness
import models
import numpy as np

START = time.perf_counter()
# 3.1 billion parameters.
QWEN_3B = {
    "vocabulary": 151_936,
    "layers": 36,
    "width": 2_048,
    "heads": 16,
    "key_value_heads": 2,
    "inner_width": 11_008,
}
IDS_PER_END = 256
BATCH_SIZE = 256


class Engine:
    """`KerasEngine` with a batch by the memory that is free.

    Args:
        sizes: Of the model.
        dtype: Of the model.
        work: `prompts`, their number, `mean_prompt_length` in tokens, of which
            none is longer than twice that, and `new`, the most tokens of an
            answer.
        cache: Folder of what JAX compiles.
    """

    def __init__(self, sizes, dtype, work, cache):
        self.sizes, self.dtype, self.new = sizes, dtype, work["new"]
        self.longest = 2 * work["mean_prompt_length"]
        prompts = generation_contestants.random_prompts(
            work["prompts"], work["mean_prompt_length"], sizes["vocabulary"]
        )
        self.prompts = [prompt[: self.longest] for prompt in prompts]
        self.ends = generation_contestants.end_token_ids(
            sizes["vocabulary"], IDS_PER_END
        )
        self.make(cache)

    def make(self, cache):
        """The model and its engine."""
        import keras_iris
        from keras_iris import backend

        backend.cache_compilations(Path(cache))
        self.engine = keras_iris.generation.KerasEngine(
            models.keras_model(self.sizes, self.dtype),
            end_token_ids=self.ends,
            max_new_tokens=self.new,
            bucket_lengths=(self.longest,),
        )

    def answer(self, seed):
        """The length of each answer."""
        completions = self.engine.generate(self.prompts, seed=seed)
        return [len(completion.token_ids) for completion in completions]

    def warm_up(self):
        """Compiles."""
        self.answer(0)

    def run(self):
        """Seconds to the first answers, then tokens a second."""
        self.warm_up()
        first = time.perf_counter() - START
        start = time.perf_counter()
        lengths = self.answer(1)
        seconds = time.perf_counter() - start
        return {
            "s to first": first,
            "tokens/s": sum(lengths) / seconds,
            "answers/s": len(lengths) / seconds,
            "mean length": float(np.mean(lengths)),
            "peak MB": harness.peak_mb(),
        }


class Transformers(Engine):
    """`transformers.generate`, prompts sorted by length."""

    def make(self, cache):
        """The model."""
        import torch
        import transformers

        del cache
        device = "cuda" if harness.is_on_gpu() else "cpu"
        torch.set_default_device(device)
        torch.set_default_dtype(getattr(torch, self.dtype))
        model = transformers.Qwen2ForCausalLM(
            models.transformers_config(self.sizes)
        )
        self.peer = generation_contestants.TransformersModel(
            model, self.ends, self.new
        )

    def warm_up(self):
        """Two answers; there is nothing to compile."""
        self.peer.answer(self.prompts[:2], BATCH_SIZE)

    def answer(self, seed):
        """The length of each answer."""
        self.peer.torch.manual_seed(seed)
        return self.peer.answer(sorted(self.prompts, key=len), BATCH_SIZE)


class Training:
    """Steps of `SelfPlayModel` that train LoRA alone.

    Args:
        sizes: Of the model.
        dtype: Of the model.
        work: `pairs` of a batch, `micro_batch_size`, and `length` of a row.
        cache: Folder of what JAX compiles.
    """

    def __init__(self, sizes, dtype, work, cache):
        import keras

        import keras_iris
        from keras_iris import backend
        from keras_iris.models import lora, remat

        backend.cache_compilations(Path(cache))
        causal_lm = models.keras_model(sizes, dtype)
        lora.add_lora(causal_lm.backbone, lora.Lora(rank=16))
        remat.remat_layers(causal_lm.backbone)
        self.model = keras_iris.SelfPlayModel(causal_lm)
        self.model.compile(
            optimizer=keras.optimizers.RMSprop(1e-5),
            loss=keras_iris.losses.IRIS(),
            micro_batch_size=work["micro_batch_size"],
        )
        self.pairs, self.length = work["pairs"], work["length"]
        self.vocabulary = sizes["vocabulary"]

    def run(self):
        """Seconds to the end of the first step, then tokens a second."""
        self.fit(1)
        first = time.perf_counter() - START
        steps = 5
        start = time.perf_counter()
        self.fit(steps)
        seconds = time.perf_counter() - start
        return {
            "s to first": first,
            "tokens/s": 2 * self.pairs * self.length * steps / seconds,
            "answers/s": None,
            "mean length": None,
            "peak MB": harness.peak_mb(),
        }

    def fit(self, steps):
        """Makes steps, each with pairs of its own."""
        from keras_iris import backend

        rows = models.random_rows(
            steps * self.pairs, self.length, self.vocabulary
        )
        dataset = models.pair_dataset(rows, self.length // 3, self.pairs)
        self.model.fit(backend.dataset(dataset), shuffle=False, verbose=0)
