"""Who trains in `train_step.py`: keras_iris, a plain loop, TRL.

And who only multiplies matrices, which all of them have to.
"""

import collections
import contextlib
import sys
import tempfile
import time

import harness
import models

LEARNING_RATE, WEIGHT_DECAY = 1e-5, 0.004


class Contestant:
    """Times steps, in float32 on CPUs and in mixed bfloat16 on GPUs.

    Args:
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
        steps: Made in one go, each with pairs of its own.
    """

    def __init__(self, sizes, batch, steps=1):
        self.sizes, self.batch, self.steps = sizes, batch, steps
        self.imported_mb = 0.0

    def run(self):
        """Seconds of a step, and the peak of memory in MB."""
        harness.reset_peak()
        return {
            "seconds": self.time_steps() / self.steps,
            "peak_mb": harness.peak_mb(),
            "imported_mb": self.imported_mb,
        }

    def rows(self):
        """Random pairs, for all steps."""
        return models.random_rows(
            self.steps * self.batch["pairs"],
            self.batch["length"],
            self.sizes["vocabulary"],
        )


class KerasIris(Contestant):
    """`SelfPlayModel.fit` on `KERAS_BACKEND`.

    Args:
        jit_compile: As of `compile`.
        hides_tensorflow: Does without, as where it isn't installed.
        **settings: As of `Contestant`.
    """

    def __init__(self, jit_compile="auto", hides_tensorflow=False, **settings):
        super().__init__(**settings)
        if hides_tensorflow:
            sys.modules["tensorflow"] = None
        import keras

        import keras_iris

        self.imported_mb = harness.resident_mb()
        dtype = "mixed_bfloat16" if harness.is_on_gpu() else "float32"
        self.model = keras_iris.SelfPlayModel(
            models.keras_model(self.sizes, dtype)
        )
        self.model.compile(
            optimizer=keras.optimizers.AdamW(
                LEARNING_RATE, weight_decay=WEIGHT_DECAY
            ),
            loss=keras_iris.losses.IRIS(),
            jit_compile=jit_compile,
        )

    def time_steps(self):
        """Seconds of all, with their data set and `fit`'s own work."""
        from keras_iris import backend

        start = time.perf_counter()
        dataset = models.pair_dataset(
            self.rows(), self.batch["prompt_length"], self.batch["pairs"]
        )
        self.model.fit(backend.dataset(dataset), shuffle=False, verbose=0)
        return time.perf_counter() - start


class PlainLoop(Contestant):
    """The loop that one would write: full logits, IRIS, `torch.optim`."""

    def __init__(self, **settings):
        super().__init__(**settings)
        import torch
        import transformers

        self.torch = torch
        self.device = "cuda" if harness.is_on_gpu() else "cpu"
        config = models.transformers_config(self.sizes)
        self.model = transformers.Qwen2ForCausalLM(config).to(self.device)
        self.imported_mb = harness.resident_mb() - (
            sum(p.nbytes for p in self.model.parameters()) / 1e6
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def time_steps(self):
        """Seconds of all."""
        start = time.perf_counter()
        pairs = self.batch["pairs"]
        rows = self.torch.as_tensor(self.rows())
        for first in range(0, len(rows), pairs):
            self._step(rows[first : first + pairs].to(self.device))
        harness.synchronize()
        return time.perf_counter() - start

    def _step(self, token_ids):
        with self.torch.autocast(
            self.device, self.torch.bfloat16, enabled=harness.is_on_gpu()
        ):
            loss = self._loss(token_ids)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _loss(self, token_ids):
        torch, batch = self.torch, self.batch
        opponent = torch.as_tensor(
            models.opponent(**_without_width(batch)), device=self.device
        )
        rows = token_ids.flatten(0, 1)  # (2 * pairs, length)
        logits = self.model(rows, use_cache=False).logits[:, :-1]
        token_log_probs = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        position = torch.arange(1, batch["length"], device=self.device)
        is_response = position >= batch["prompt_length"]
        log_probs = (token_log_probs * is_response).sum(1).view(-1, 2)
        ratio = log_probs - opponent
        # IRIS at alpha = 1.
        mean_exp = torch.logsumexp(ratio[:, 1], 0) - torch.log(
            torch.tensor(float(len(ratio)))
        )
        return mean_exp - ratio[:, 0].mean()


class Trl(Contestant):
    """TRL's `DPOTrainer`."""

    def __init__(self, **settings):
        super().__init__(**settings)
        import datasets
        import transformers
        import trl

        model = transformers.Qwen2ForCausalLM(
            models.transformers_config(self.sizes)
        )
        self.imported_mb = harness.resident_mb() - (
            sum(p.nbytes for p in model.parameters()) / 1e6
        )
        self.folder = tempfile.TemporaryDirectory()
        self.stamps = stamps = []

        class Stamps(transformers.TrainerCallback):
            def on_step_begin(self, *arguments, **keywords):
                stamps.append(time.perf_counter())

            def on_step_end(self, args, state, control, **keywords):
                if state.global_step == args.max_steps:
                    harness.synchronize()
                stamps.append(time.perf_counter())

        self.trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=self.batch["pairs"],
                precompute_ref_log_probs=True,
                learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                gradient_checkpointing=False,
                bf16=harness.is_on_gpu(),
                use_cpu=not harness.is_on_gpu(),
                max_steps=self.steps,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(self._texts()),
            processing_class=models.number_tokenizer(self.sizes["vocabulary"]),
            callbacks=[Stamps()],
        )

    def time_steps(self):
        """Seconds of all, what `train` does before the first apart."""
        self.stamps.clear()
        with contextlib.redirect_stdout(None):
            self.trainer.train()
        return self.stamps[-1] - self.stamps[0]

    def _texts(self):
        """Pairs as texts of numbers, one a token; TRL adds the end token."""
        texts, prompt_length = [], self.batch["prompt_length"]
        for real, synthetic in self.rows()[:, :, :-1]:
            texts.append(
                {
                    "prompt": _text(real[:prompt_length]),
                    "chosen": " " + _text(real[prompt_length:]),
                    "rejected": " " + _text(synthetic[prompt_length:]),
                }
            )
        return texts


class Products(Contestant):
    """The products of a step's kernels, and nothing else, on PyTorch.

    A forward and two backward products of each, the head's for the tokens of
    responses. Attention's own are left out.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        import torch

        self.imported_mb = harness.resident_mb()
        self.factors = [
            (torch.randn(m, k), torch.randn(k, n), torch.randn(m, n), number)
            for (m, k, n), number in self._shapes().items()
        ]

    def time_steps(self):
        """Seconds of all products of a step."""
        start = time.perf_counter()
        for inputs, kernel, gradient, number in self.factors:
            for _ in range(number):
                inputs @ kernel
                gradient @ kernel.T
                inputs.T @ gradient
        return time.perf_counter() - start

    def _shapes(self):
        """Tokens, inputs and outputs of the kernels, and how many there are."""
        sizes, batch = self.sizes, self.batch
        width, inner = sizes["width"], sizes["inner_width"]
        shared = width * sizes["key_value_heads"] // sizes["heads"]
        layer = [(width, width)] * 2 + [(width, shared)] * 2
        layer += [(width, inner)] * 2 + [(inner, width)]
        rows, length = 2 * batch["pairs"], batch["length"]
        shapes = [(rows * length, *kernel) for kernel in layer]
        shapes *= sizes["layers"]
        answers = rows * (length - batch["prompt_length"])
        shapes.append((answers, width, sizes["vocabulary"]))
        return collections.Counter(shapes)


def _text(token_ids):
    return " ".join(map(str, token_ids))


def _without_width(batch):
    return {
        "num_pairs": batch["pairs"],
        "prompt_length": batch["prompt_length"],
        "length": batch["length"],
    }
