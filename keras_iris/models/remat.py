"""Per-layer rematerialisation of a built backbone."""

from typing import Any

import keras

from keras_iris import backend


def remat_layers(backbone: keras.Model) -> None:
    """Makes the backward pass recompute each decoder layer's activations.

    Between the passes only the inputs of the layers are kept. It costs one
    more forward pass. Calls with a cache, which generation makes, stay as they
    are. (`keras.RematScope` of Keras 3.15 fails with KerasHub's layers on
    JAX when `training=True`, and doesn't reach a built model.)

    On JAX on a CPU the memory falls only with
    `XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false`: the
    usual scheduler recomputes all layers at once.

    It isn't part of the backbone's configuration: call it again on a copy.

    Args:
        backbone: A built KerasHub backbone with `transformer_layers`.

    Raises:
        ValueError: It has no such layers, or one has dropout, whose mask
            would be another one when it is computed again.
    """
    layers = getattr(backbone, "transformer_layers", None)
    if layers is None:
        raise ValueError(
            "Rematerialisation needs a KerasHub backbone with "
            f"`transformer_layers`. Received: {type(backbone).__name__}. Pass "
            "`causal_lm.backbone`."
        )
    for layer in layers:
        _check_dropout(layer)
    backend.prepare_remat()
    for layer in layers:
        if not isinstance(layer.call, _RematCall):
            layer.call = _RematCall(layer)


def _check_dropout(layer: keras.layers.Layer) -> None:
    for part in layer._flatten_layers():
        if isinstance(part, keras.layers.Dropout) and part.rate > 0:
            raise ValueError(
                "Rematerialisation computes a layer again and would draw "
                f"another dropout mask. Received: dropout {part.rate} in "
                f"{layer.name}. Load the model with `dropout=0.0`, or without "
                "rematerialisation."
            )


class _RematCall:
    """A layer's `call` whose activations aren't kept.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: keras.layers.Layer):
        self._layer = layer
        self._call = layer.call

    def __call__(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        caches = ("self_attention_cache", "cache")
        if any(kwargs.get(name) is not None for name in caches):
            return self._call(hidden_states, *args, **kwargs)

        def call(hidden_states: Any) -> Any:
            output = self._call(hidden_states, *args, **kwargs)
            if backend.count_layer_losses(self._layer):
                raise ValueError(
                    f"{self._layer.name} adds a loss of its own, such as a "
                    "router's, whose gradient rematerialisation would lose. "
                    "Load the model without rematerialisation."
                )
            return output

        return backend.remat(call)(hidden_states)
