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
    """Times steps.

    Args:
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
    """

    def __init__(self, sizes, batch):
        self.sizes, self.batch = sizes, batch
        self.imported_mb = 0.0

    def run(self):
        """Seconds of a step, and the peak of memory in MB."""
        harness.reset_peak()
        return {
            "seconds": self.time_step(),
            "peak_mb": harness.peak_mb(),
            "imported_mb": self.imported_mb,
        }

    def rows(self, num_pairs):
        """Random pairs."""
        length, vocabulary = self.batch["length"], self.sizes["vocabulary"]
        return models.random_rows(num_pairs, length, vocabulary)


class KerasIris(Contestant):
    """`SelfPlayModel.fit` on `KERAS_BACKEND`.

    Args:
        sizes: Of the model.
        batch: As of `Contestant`.
        jit_compile: As of `compile`.
        hides_tensorflow: Does without, as where it isn't installed.
    """

    def __init__(
        self, sizes, batch, jit_compile="auto", hides_tensorflow=False
    ):
        super().__init__(sizes, batch)
        if hides_tensorflow:
            sys.modules["tensorflow"] = None
        import keras

        import keras_iris

        self.imported_mb = harness.resident_mb()
        self.model = keras_iris.SelfPlayModel(models.keras_model(sizes))
        self.model.compile(
            optimizer=keras.optimizers.AdamW(
                LEARNING_RATE, weight_decay=WEIGHT_DECAY
            ),
            loss=keras_iris.losses.IRIS(),
            jit_compile=jit_compile,
        )

    def time_step(self):
        """Seconds of a step, its data set and `fit`'s own work included."""
        from keras_iris import backend

        start = time.perf_counter()
        pairs = self.batch["pairs"]
        dataset = models.pair_dataset(
            self.rows(pairs), self.batch["prompt_length"], pairs
        )
        self.model.fit(backend.dataset(dataset), shuffle=False, verbose=0)
        return time.perf_counter() - start


class PlainLoop(Contestant):
    """The loop that one would write: full logits, IRIS, `torch.optim`."""

    def __init__(self, sizes, batch):
        super().__init__(sizes, batch)
        import torch
        import transformers

        self.torch = torch
        config = models.transformers_config(sizes)
        self.model = transformers.Qwen2ForCausalLM(config)
        self.imported_mb = harness.resident_mb() - (
            sum(p.nbytes for p in self.model.parameters()) / 1e6
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )

    def time_step(self):
        """Seconds of a step."""
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    def _step(self):
        torch, batch = self.torch, self.batch
        token_ids = torch.as_tensor(self.rows(batch["pairs"]))
        opponent = torch.as_tensor(models.opponent(**_without_width(batch)))
        rows = token_ids.flatten(0, 1)  # (2 * pairs, length)
        logits = self.model(rows, use_cache=False).logits[:, :-1]
        token_log_probs = -torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        is_response = torch.arange(1, batch["length"]) >= batch["prompt_length"]
        log_probs = (token_log_probs * is_response).sum(1).view(-1, 2)
        ratio = log_probs - opponent
        # IRIS at alpha = 1.
        mean_exp = torch.logsumexp(ratio[:, 1], 0) - torch.log(
            torch.tensor(float(len(ratio)))
        )
        loss = mean_exp - ratio[:, 0].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Trl(Contestant):
    """TRL's `DPOTrainer`."""

    def __init__(self, sizes, batch):
        super().__init__(sizes, batch)
        import datasets
        import transformers
        import trl

        model = transformers.Qwen2ForCausalLM(models.transformers_config(sizes))
        self.imported_mb = harness.resident_mb() - (
            sum(p.nbytes for p in model.parameters()) / 1e6
        )
        self.folder = tempfile.TemporaryDirectory()
        self.stamps = stamps = []

        class Stamps(transformers.TrainerCallback):
            def on_step_begin(self, *arguments, **keywords):
                stamps.append(time.perf_counter())

            def on_step_end(self, *arguments, **keywords):
                stamps.append(time.perf_counter())

        self.trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(
                output_dir=self.folder.name,
                per_device_train_batch_size=batch["pairs"],
                precompute_ref_log_probs=True,
                learning_rate=LEARNING_RATE,
                weight_decay=WEIGHT_DECAY,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                max_steps=1,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=datasets.Dataset.from_list(self._texts()),
            processing_class=models.number_tokenizer(sizes["vocabulary"]),
            callbacks=[Stamps()],
        )

    def time_step(self):
        """Seconds of a step, what `train` does before it apart."""
        self.stamps.clear()
        with contextlib.redirect_stdout(None):
            self.trainer.train()
        return self.stamps[-1] - self.stamps[0]

    def _texts(self):
        """Pairs as texts of numbers, one a token; TRL adds the end token."""
        texts, prompt_length = [], self.batch["prompt_length"]
        for real, synthetic in self.rows(4 * self.batch["pairs"])[:, :, :-1]:
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

    def __init__(self, sizes, batch):
        super().__init__(sizes, batch)
        import torch

        self.imported_mb = harness.resident_mb()
        self.factors = [
            (torch.randn(m, k), torch.randn(k, n), torch.randn(m, n), number)
            for (m, k, n), number in self._shapes().items()
        ]

    def time_step(self):
        """Seconds of all products."""
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
