"""The model that self-play trains: it predicts pairs of log-probs."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_iris import backend
from keras_iris.data import PairDataset
from keras_iris.losses import SelfPlayLoss
from keras_iris.metrics import PairBatch, PairMetric
from keras_iris.metrics.recent import RecentLogProbs
from keras_iris.models.checks import (
    check_causal_lm,
    check_compile,
    check_fit,
    check_input_ids,
    check_inputs,
    check_length,
    check_lora,
    check_loss,
    check_micro_batch_size,
    check_optimizer,
    check_weights,
)
from keras_iris.models.log_probs import sequence_log_probs, token_log_probs
from keras_iris.models.lora import Lora, add_lora, find_lora

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_iris")
class SelfPlayModel(backend.Trainer):
    """A causal language model that scores pairs of responses.

    Its prediction for a pair is `(log p(annotated), log p(synthetic))`, in
    nats. So `predict` scores the opponent, a self-play objective is a loss of
    opponent and policy log-probs, and `fit`, `evaluate`, callbacks and
    checkpoints are Keras' own. The weights are those of `causal_lm`.

    Inputs are dictionaries of three tensors of shape `(batch, 2, time)`,
    where the second axis is (annotated, synthetic); or `(batch, 3, time)` with
    a proto-synthetic response, of the first policy, for `losses.TSPIN`:

    - `token_ids`: integers, prompt and response, padded on the right;
    - `padding_mask`: 1 for tokens, 0 for padding;
    - `response_mask`: 1 for response tokens, the end token included.

    Args:
        causal_lm: A KerasHub `CausalLM` whose output layer is its backbone's
            `token_embedding` (Qwen, Mistral, Llama, Gemma, GPT-2, ...). Its
            preprocessor may be `None`.
        name: Name of the model.

    Raises:
        ValueError: `causal_lm` has no such backbone and output layer, or a
            quantized one.

    Examples:
        ```python
        model = keras_iris.SelfPlayModel(causal_lm)
        opponent = model.predict(inputs)
        model.compile(
            optimizer=keras.optimizers.AdamW(5e-7),
            loss=keras_iris.losses.IRIS(alpha=1.0),
            micro_batch_size=4,
        )
        model.fit(inputs, opponent, batch_size=64)
        ```
    """

    def __init__(
        self, causal_lm: keras.Model, *, name: str | None = None, **kwargs: Any
    ) -> None:
        check_causal_lm(causal_lm)
        kwargs.setdefault("dtype", causal_lm.backbone.dtype_policy)
        super().__init__(name=name, **kwargs)
        self.causal_lm = causal_lm
        self.alpha = self._add_state("alpha", (), "ones")
        # In nats; with the sums that it is made from, weight, mean and sum of
        # squared deviations of the opponent's log-prob per token, and squared
        # weights, annotated and synthetic. All are saved with the weights.
        self.gap = self._add_state("gap", (), "zeros")
        self.gap_sums = self._add_state("gap_sums", (2, 4), "zeros")
        self.micro_batch_size: int | None = None
        self.recent = RecentLogProbs()
        self._is_training = False
        self._set_metrics([])
        self.compile_options: dict[str, Any] = {}
        # As compiled: training changes the order of `loss`.
        self.loss_config: dict[str, Any] = {}
        self.built = True

    def compile(  # noqa: PLR0913
        self,
        optimizer: Any = "rmsprop",
        loss: SelfPlayLoss | None = None,
        *,
        metrics: Any = None,
        weighted_metrics: Any = None,
        micro_batch_size: int | None = None,
        loss_weights: None = None,
        **kwargs: Any,
    ) -> None:
        """Configures the model for training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: A `keras_iris.losses.SelfPlayLoss`, of which the model takes
                a copy. The order of an `IRIS` loss becomes `model.alpha`,
                which takes its value.
            metrics: A metric or a list of metrics of `(y_true, y_pred)`, all
                weighted by `sample_weight`, and of `keras_iris.metrics`.
            weighted_metrics: More of the same.
            micro_batch_size: Pairs per forward and backward pass, or twice
                as many single responses. Loss, gradient and metrics are those
                of the whole batch for every value; `None` takes the batch at
                once. `evaluate` and `predict` go by it, too. The losses of
                KerasHub's routers of experts cost one more forward pass; of
                other layers that add losses the first step is refused.
            loss_weights: Not taken: there is one loss.
            **kwargs: Other arguments of `keras.Model.compile`.

        Raises:
            ValueError: For a loss of another type, a `micro_batch_size`
                below 1, metrics by output name, `loss_weights`, Keras' own
                LoRA, or an optimizer that can't train the dtype.
        """
        if loss is not None and not isinstance(loss, SelfPlayLoss):
            raise ValueError(
                "`loss` has to be a `keras_iris.losses.SelfPlayLoss`, such as "
                f"`keras_iris.losses.IRIS()`. Received: loss={loss!r}"
            )
        if loss_weights is not None:
            raise ValueError(
                "`loss_weights` is not taken, as there is one loss: scale the "
                f"learning rate. Received: loss_weights={loss_weights!r}"
            )
        check_lora(self)
        micro_batch_size = check_micro_batch_size(micro_batch_size)
        optimizer = keras.optimizers.get(optimizer)
        check_optimizer(optimizer, self.trainable_variables)
        self.micro_batch_size = micro_batch_size
        self.check_devices()
        if loss is not None:
            self.loss_config = loss.get_config()
            loss = copy.copy(loss)  # which may be another model's as well
            loss.bind_alpha(self.alpha)
        self.compile_options = kwargs
        metrics = _metric_list(metrics) + _metric_list(weighted_metrics)
        check_compile(metrics, **kwargs)
        self._set_metrics(metrics)
        # Keras would keep those of a `compile` before.
        self.loss: Any = None
        self._compile_loss: Any = None
        self._compile_metrics: Any = None
        super().compile(
            optimizer=optimizer,
            loss=loss,
            weighted_metrics=self._other_metrics or None,
            **kwargs,
        )

    def add_metrics(self, metrics: Sequence[PairMetric]) -> None:
        """Adds metrics of pairs to those that the model is compiled with.

        Args:
            metrics: Those whose names are tracked already are left out.
        """
        names = self.metrics_names
        new = [metric for metric in metrics if metric.name not in names]
        if new:
            self._set_metrics([*self.own_metrics, *new])
            # They were compiled without.
            self.train_function = self.test_function = None

    def _set_metrics(self, metrics: list[Any]) -> None:
        pairs = [m for m in metrics if isinstance(m, PairMetric)]
        others = [m for m in metrics if not isinstance(m, PairMetric)]
        # Past Keras, which would track them once more, and for ever.
        object.__setattr__(self, "_pair_metrics", pairs)
        object.__setattr__(self, "_other_metrics", others)

    def _add_state(
        self, name: str, shape: tuple[int, ...], initializer: str
    ) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=False,
            dtype="float32",
            autocast=False,
        )

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains the model, as `keras.Model.fit`.

        Args:
            x: As in Keras. A `keras_iris.data.PairDataset` shuffles itself: its
                order is that of the epoch that Keras counts.
            *args: Other arguments of `keras.Model.fit`.
            **kwargs: The same by name.

        Returns:
            A `keras.callbacks.History`.
        """
        options = _options(super().fit, x, *args, **kwargs)
        check_fit(self, options)
        check_input_ids(self, x)
        self.check_devices()
        self.recent.num_samples = 1
        if isinstance(x, PairDataset):
            self.recent.num_samples = x.num_samples
            callbacks = keras.tree.flatten(options.get("callbacks") or [])
            options |= {
                "x": backend.dataset(x, is_training=True),
                "shuffle": False,
                "callbacks": [_Epochs(x), *callbacks],
            }
        options["validation_data"] = _fixed(options.get("validation_data"))
        return super().fit(**options)

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Loss and metrics, as `keras.Model.evaluate`.

        Args:
            x: As in Keras; a `keras_iris.data.PairDataset` is taken in
                the order of its epoch 0.
            *args: Other arguments of `keras.Model.evaluate`.
            **kwargs: The same by name.

        Returns:
            The loss, a list of numbers, or a dictionary.
        """
        options = _options(super().evaluate, x, *args, **kwargs)
        check_weights(options)
        check_input_ids(self, x)
        return super().evaluate(**options | {"x": _fixed(x)})

    def test_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Loss and metrics, as `keras.Model.test_on_batch`."""
        options = _options(super().test_on_batch, x, *args, **kwargs)
        check_weights(options)
        check_input_ids(self, x)
        return super().test_on_batch(**options)

    def train_on_batch(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """A step, as `keras.Model.train_on_batch`."""
        options = _options(super().train_on_batch, x, *args, **kwargs)
        check_fit(self, options)
        check_input_ids(self, x)
        return super().train_on_batch(**options)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Log-probs of pairs, as `keras.Model.predict`.

        Args:
            x: As in Keras; the rows of a `keras_iris.data.PairDataset` are
                given in the order of its synthetic responses.
            *args: Other arguments of `keras.Model.predict`.
            **kwargs: The same by name.

        Returns:
            Float32 array of shape `(pairs, 2)` or `(pairs, 3)`, in nats.
        """
        check_input_ids(self, x)
        log_probs = super().predict(_fixed(x), *args, **kwargs)
        if not isinstance(x, PairDataset):
            return log_probs
        x = x.at_epoch(0)
        indices = np.concatenate([x.indices(i) for i in range(len(x))])
        if len(log_probs) != len(indices):
            raise ValueError(
                "`predict` takes all of a `PairDataset`, as it sorts the rows. "
                f"Received: steps for {len(log_probs)} of {len(indices)} rows."
            )
        return np.asarray(log_probs)[indices >= 0][
            np.argsort(indices[indices >= 0])
        ]

    def reset_order(self) -> None:
        """Sets the order that the loss was compiled with, and no gap."""
        self.alpha.assign(self.loss_config.get("alpha", 1.0))
        self.gap.assign(0.0)
        self.gap_sums.assign(np.zeros((2, 4)))

    @contextlib.contextmanager
    def finalizing_if(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Lets a `fit` end in the middle of a training that goes on.

        Args:
            is_over: Whether the training is over as a `fit` ends. If not,
                what the optimizer then does to the weights, such as `use_ema`
                making them its averages, is left to a later one.
        """
        optimizer = self.optimizer
        finalize = optimizer.finalize_variable_values
        optimizer.finalize_variable_values = lambda variables: (
            finalize(variables) if is_over() else None
        )
        try:
            yield
        finally:
            del optimizer.finalize_variable_values

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        """Log-probs of pairs.

        Args:
            inputs: The three tensors of shape `(batch, 2, time)`; or of shape
                `(batch, n, time)` for any other number of responses.
            training: Whether dropout is on.

        Returns:
            Float32 tensor of shape `(batch, 2)` or `(batch, n)`, in nats.

        Raises:
            ValueError: The inputs aren't such tensors.
        """
        token_ids, _, _ = check_inputs(inputs)
        size, num_rows = self.micro_batch_size, token_ids.shape[0]
        is_small = size and num_rows is not None and num_rows <= size
        if training is not False or size is None or is_small:
            return self._log_probs(sequence_log_probs, inputs, training)

        def part(inputs: dict[str, Tensor]) -> Tensor:
            log_probs = self._log_probs(sequence_log_probs, inputs, training)
            backend.refuse_layer_losses(self)
            return log_probs

        return backend.map_parts(part, dict(inputs), size)

    def compute_output_spec(
        self, inputs: dict[str, Any], training: bool | None = None
    ) -> keras.KerasTensor:
        """Shape and type of what `call` gives, for functional models."""
        return keras.KerasTensor(inputs["token_ids"].shape[:2], "float32")

    def save_own_variables(self, store: Any) -> None:
        """Saves alpha and the gap; Keras calls it before it saves layers."""
        check_lora(self)
        super().save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Loads alpha and the gap; Keras calls it before it loads layers."""
        check_lora(self)
        super().load_own_variables(store)

    def token_log_probs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probs of the responses' tokens, for a look at few pairs.

        Args:
            inputs: The three tensors of shape `(batch, n, time)`.

        Returns:
            Float32 tensor of shape `(batch, n, time - 1)`, in nats, for the
            tokens from the second position on; 0 where `response_mask` is.
        """
        return self._log_probs(token_log_probs, inputs, training=False)

    def _log_probs(
        self,
        function: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        training: bool | None,
    ) -> Tensor:
        """What `function` makes of the backbone's output, `(batch, n, ...)`."""
        token_ids, padding_mask, response_mask = check_inputs(inputs)
        num_responses, time = ops.shape(token_ids)[1:]
        check_length(self.causal_lm, token_ids.shape[2])

        def flat(tensor: Tensor) -> Tensor:
            return ops.reshape(tensor, (-1, time))

        token_ids = flat(token_ids)
        backbone = self.causal_lm.backbone
        hidden_states = backbone(
            {
                "token_ids": token_ids,
                "padding_mask": ops.cast(flat(padding_mask), "int32"),
            },
            training=training,
        )
        log_probs = function(
            hidden_states,
            token_ids,
            flat(response_mask),
            head=backbone.token_embedding,
        )
        shape = (-1, num_responses, *ops.shape(log_probs)[1:])
        return ops.reshape(log_probs, shape)

    @property
    def own_metrics(self) -> list[keras.metrics.Metric]:
        """What `compile` got as metrics, and `add_metrics`."""
        return [*self._pair_metrics, *self._other_metrics]

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Keras' metrics and those of pairs."""
        return [*super().metrics, *self._pair_metrics]

    @property
    def metrics_names(self) -> list[str]:
        """Names of the numbers that `evaluate` returns."""
        names = []
        for metric in self.metrics:
            if metric is self._compile_metrics:
                names += [part.name for part in metric.metrics]
            elif metric is not self.recent:
                names.append(metric.name)
        return names

    def _symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        # Keras (3.15) would find out the shape of log-probs by a forward pass
        # of the whole batch, on PyTorch with real numbers.
        log_probs = keras.KerasTensor((None, 2))
        for part in (self._compile_loss, self._compile_metrics):
            if part is not None and not part.built:
                part.build(log_probs, log_probs)
        super()._symbolic_build(iterator, data_batch)

    def compute_loss(  # noqa: PLR0913 (the arguments of Keras)
        self,
        x: Any = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """The loss of a batch, as in `keras.Model`."""
        check_loss(self.loss)
        # On JAX, metrics see the model's variables nowhere else.
        self.recent.alpha.assign(self.alpha)
        self.recent.gap.assign(self.gap)
        # What comes next in any step are the metrics, which aren't told.
        self._is_training = training
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def compute_metrics(
        self, x: Any, y: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> dict[str, Tensor]:
        """Updates all metrics and returns their results."""
        num_tokens = ops.sum(ops.cast(x["response_mask"], "float32"), axis=-1)
        if sample_weight is None:
            sample_weight = ops.ones_like(num_tokens[:, 0])
        recent = self.recent
        # Metrics are of annotated and synthetic responses.
        opponent, policy, num_tokens = (
            values[:, :2] for values in (y, y_pred, num_tokens)
        )
        batch = PairBatch(
            opponent,
            policy,
            num_tokens,
            sample_weight,
            alpha=recent.alpha,
            gap=recent.gap,
            gradient_norm=recent.gradient_norm if self._is_training else 0.0,
        ).to_tensors()
        if self._is_training:
            recent.update_state(batch)
        for metric in self._pair_metrics:
            metric.update_state(batch)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was called with."""
        if not self.compiled:
            return {}
        serialize = keras.saving.serialize_keras_object
        return {
            "optimizer": serialize(self.optimizer),
            # As it was compiled: the order that it has now is a weight.
            "loss": self.loss
            and {**serialize(self.loss), "config": self.loss_config},
            "metrics": [serialize(m) for m in self.own_metrics],
            "micro_batch_size": self.micro_batch_size,
            **self.compile_options,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles the model again."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        with self.device_scope():
            self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """The model's configuration, without weights."""
        causal_lm = keras.saving.serialize_keras_object(self.causal_lm)
        # Made for `generate` by KerasHub itself, and not to be restored.
        causal_lm.pop("compile_config", None)
        lora = find_lora(self.causal_lm.backbone)
        return {
            "causal_lm": causal_lm,
            "lora": lora and lora.get_config(),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SelfPlayModel":
        """Builds a model from its configuration."""
        causal_lm = keras.saving.deserialize_keras_object(config["causal_lm"])
        if config["lora"] is not None:
            add_lora(causal_lm.backbone, Lora(**config["lora"]))
        return cls(causal_lm, name=config["name"])


class _Epochs(keras.callbacks.Callback):
    """Tells a data set which epoch it is."""

    def __init__(self, dataset: PairDataset) -> None:
        super().__init__()
        self.dataset = dataset

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Before Keras takes the first batch."""
        self.dataset.epoch = epoch


def _fixed(data: Any) -> Any:
    """Data for `evaluate`: the same batches every time."""
    if isinstance(data, PairDataset):
        return backend.dataset(data.at_epoch(0))
    return data


def _options(
    method: Callable[..., Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of a call, by name."""
    options = dict(inspect.signature(method).bind(*args, **kwargs).arguments)
    return options | options.pop("kwargs", {})  # Keras' own, of `evaluate`


def _metric_list(metrics: Any) -> list[Any]:
    if isinstance(metrics, dict):
        raise ValueError(
            "Metrics have to be a list, as the model has one output. "
            f"Received: {metrics}"
        )
    # Keras takes a list for each output, too.
    return [m for m in keras.tree.flatten(metrics) if m is not None]
