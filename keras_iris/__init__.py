"""Self-play fine-tuning of language models in Keras 3.

What is listed below is imported when it is first used, as Keras and its backend
take seconds.
"""

import importlib
import sys
import typing

from keras_iris.start_up import keep_quiet as _keep_quiet

if typing.TYPE_CHECKING:
    from keras_iris import (
        callbacks,
        data,
        distribution,
        evaluation,
        generation,
        hub,
        losses,
        metrics,
        models,
    )
    from keras_iris.hub.export import export
    from keras_iris.hub.load import load
    from keras_iris.models import SelfPlayModel
    from keras_iris.run_estimate import estimate
    from keras_iris.self_play import SelfPlay

__version__ = "0.1.0"

__all__ = [
    "SelfPlay",
    "SelfPlayModel",
    "callbacks",
    "data",
    "distribution",
    "estimate",
    "evaluation",
    "export",
    "generation",
    "hub",
    "load",
    "losses",
    "metrics",
    "models",
]

# The modules of those that aren't modules themselves.
_MODULES = {
    "SelfPlay": "self_play",
    "SelfPlayModel": "models",
    "estimate": "run_estimate",
    "export": "hub",
    "load": "hub",
}


def __getattr__(name: str) -> typing.Any:
    """Imports what is listed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    """The names, for completion."""
    return sorted({*globals(), *__all__})


_keep_quiet()
if "keras" in sys.modules:
    # `keras.saving.load_model` finds the classes of those that are imported.
    importlib.import_module(f"{__name__}.models")
