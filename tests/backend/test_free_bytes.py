"""How much memory is free, from what devices say."""

from types import SimpleNamespace

import keras
import pytest

from keras_iris import backend

NAME = keras.backend.backend()


def only_on(name):
    return pytest.mark.skipif(NAME != name, reason=f"{name} only")


def test_cpus_tell_nothing():
    is_on_cpu = backend.is_on_cpu(keras.ops.zeros(1))
    assert (backend.free_bytes() is None) == is_on_cpu


@only_on("jax")
@pytest.mark.parametrize(
    ("stats", "of_others", "expected"),
    [
        ([(100, 30), (100, 60)], [], 40),
        ([(100, 30), (100, 60)], [90, 25], 25),  # of other processes
        ([(100, 30), None], [], None),
        ([(100, 30)], [0], None),  # one of them doesn't know
    ],
)
def test_of_jax(stats, of_others, expected, monkeypatch):
    import jax

    from keras_iris.backend import jax_processes

    names = ("bytes_limit", "bytes_in_use")
    devices = [
        SimpleNamespace(
            memory_stats=lambda told=told: (
                told and dict(zip(names, told, strict=True))
            )
        )
        for told in stats
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(
        jax_processes, "exchange", lambda text: [text, *map(str, of_others)]
    )
    assert backend.free_bytes() == expected


@only_on("torch")
def test_of_torch(monkeypatch):
    from torch import cuda

    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (50, 100))
    # Kept for tensors to come.
    monkeypatch.setattr(cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 20)
    assert backend.free_bytes() == 60


@only_on("tensorflow")
def test_of_tensorflow(monkeypatch):
    from tensorflow import config

    limits = {"a": [SimpleNamespace(memory_limit=3)], "b": None}
    used = {"GPU:0": {"current": 2**20}}
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: ["a"])
    monkeypatch.setattr(config, "get_logical_device_configuration", limits.get)
    monkeypatch.setattr(config.experimental, "get_memory_info", used.get)
    assert backend.free_bytes() == 2 * 2**20
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: ["b"])
    assert backend.free_bytes() is None
