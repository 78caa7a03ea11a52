"""Models in and out of Hugging Face and KerasHub, with tested parity."""

from keras_iris.hub.adapter import load_adapter, save_adapter
from keras_iris.hub.export import export
from keras_iris.hub.inspect import inspect
from keras_iris.hub.load import load

__all__ = ["export", "inspect", "load", "load_adapter", "save_adapter"]
