"""Recorded passes of PyTorch; without a GPU, functions called again."""

import contextlib
import contextvars

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.losses import IRIS, SPIN, TSPIN

if keras.backend.backend() != "torch":
    pytest.skip("of PyTorch", allow_module_level=True)

import torch

from keras_iris.backend import torch_graphs

PAIRS = make_pairs(batch_size=8)
TRIPLES = {k: v[:, [0, 1, 1]].copy() for k, v in PAIRS.items()}
OBJECTIVES = {
    "iris": IRIS,
    "anchored spin": lambda: SPIN(sft_weight=0.5),
    "tspin": lambda: TSPIN(0.2, 0.7),
}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Stands in for CUDA graphs: the same calls, seen from outside."""
    if torch.cuda.is_available():
        return

    def capture(function, pool):
        del pool
        gradients = [
            (leaf, leaf.grad) for leaf in LEAVES if leaf.grad is not None
        ]
        context = contextvars.copy_context()

        def replay():
            others = [leaf.grad for leaf, _ in gradients]
            for leaf, own in gradients:
                leaf.grad = own
            with torch.enable_grad():
                context.run(function)
            for (leaf, _), other in zip(gradients, others, strict=True):
                leaf.grad = other

        function()
        return replay

    monkeypatch.setattr(torch_graphs, "_capture", capture)
    monkeypatch.setattr(torch_graphs, "_no_waits", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


LEAVES = []


def make_model(objective="iris", micro_batch_size=None, **options):
    keras.utils.set_random_seed(0)
    model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile(
        optimizer=keras.optimizers.SGD(0.01),
        loss=OBJECTIVES[objective](),
        micro_batch_size=micro_batch_size,
        **options,
    )
    LEAVES[:] = [v.value for v in model.trainable_variables]
    return model


def train(model, steps=4):
    """Losses, and how the weights have changed."""
    before = [v.numpy() for v in model.trainable_variables]
    inputs = TRIPLES if model.loss.max_responses == 3 else PAIRS
    opponent = -3.6 * inputs["response_mask"].sum(-1).astype("float32")
    losses = [model.train_on_batch(inputs, opponent) for _ in range(steps)]
    after = [v.numpy() for v in model.trainable_variables]
    return losses, [new - old for new, old in zip(after, before, strict=True)]


def assert_same(found, expected):
    """Where a GPU adds up in any order, float32 rounds differently."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    scale = np.linalg.norm(np.concatenate([c.ravel() for c in expected[1]]))
    for change, other in zip(found[1], expected[1], strict=True):
        assert np.linalg.norm(change - other) <= 1e-5 * scale


def record_on_cpu(model, monkeypatch):
    """Makes a model record on a processor, too."""
    recorder = model._recorder = torch_graphs.Recorder(model)

    def call(self, x):
        return recorder({k: torch.as_tensor(v) for k, v in x.items()})

    if not torch.cuda.is_available():
        monkeypatch.setattr(type(model), "_call", call)
    return recorder


@pytest.mark.parametrize(
    ("objective", "micro_batch_size"),
    [("iris", None), ("iris", 3), ("anchored spin", 2), ("tspin", 3)],
)
def test_the_same_as_without(objective, micro_batch_size, monkeypatch):
    expected = train(make_model(objective, micro_batch_size, run_eagerly=True))
    model = make_model(objective, micro_batch_size)
    recorder = record_on_cpu(model, monkeypatch)
    found = train(model)
    assert recorder._passes
    assert_same(found, expected)


def test_regularisers_have_their_gradient_beside(monkeypatch):
    def regularised():
        model = make_model()
        embeddings = model.causal_lm.backbone.token_embedding.embeddings
        embeddings.regularizer = keras.regularizers.L2(0.1)
        return model

    model = regularised()
    model.run_eagerly = True
    expected = train(model)
    model = regularised()
    recorder = record_on_cpu(model, monkeypatch)
    found = train(model)
    assert recorder._passes
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_what_is_not_used_has_no_gradient(monkeypatch):
    """A gradient of zeros would let weight decay move it."""
    model = make_model()
    unused = model.add_weight(shape=(3,), initializer="ones", name="unused")
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.5), loss=IRIS())
    LEAVES[:] = [v.value for v in model.trainable_variables]
    recorder = record_on_cpu(model, monkeypatch)
    train(model)
    assert recorder._passes
    np.testing.assert_array_equal(unused.numpy(), 1)


def test_what_is_trained_changes(monkeypatch):
    """What was recorded would go on to train the others."""
    model = make_model()
    recorder = record_on_cpu(model, monkeypatch)
    train(model)
    model.causal_lm.backbone.token_embedding.trainable = False
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss=IRIS())
    assert model._recorder is None
    model._recorder = recorder
    LEAVES[:] = [v.value for v in model.trainable_variables]
    before = model.causal_lm.backbone.token_embedding.embeddings.numpy()
    train(model)
    after = model.causal_lm.backbone.token_embedding.embeddings.numpy()
    np.testing.assert_array_equal(after, before)
    assert len(recorder._passes) == 1


def test_what_cannot_be_recorded_is_called(monkeypatch):
    expected = train(make_model(run_eagerly=True))
    model = make_model()
    recorder = record_on_cpu(model, monkeypatch)

    @contextlib.contextmanager
    def fails():
        raise RuntimeError("called a synchronizing CUDA operation")
        yield

    monkeypatch.setattr(torch_graphs, "_no_waits", fails)
    with pytest.warns(UserWarning, match="recorded as CUDA graphs"):
        found = train(model)
    assert not recorder._passes
    assert_same(found, expected)


def test_a_recording_that_breaks_is_an_error(monkeypatch):
    model = make_model()
    record_on_cpu(model, monkeypatch)

    def breaks(*_):
        raise RuntimeError("operation failed due to a previous error")

    monkeypatch.setattr(torch_graphs, "_capture", breaks)
    with pytest.raises(RuntimeError, match="run_eagerly=True.*previous error"):
        train(model)


def test_a_shape_that_occurs_once_is_not_recorded(monkeypatch):
    model = make_model()
    recorder = record_on_cpu(model, monkeypatch)
    train(model, steps=1)
    assert not recorder._passes


def test_generation_has_the_memory_after_fit():
    model = make_model()
    model._recorder = torch_graphs.Recorder(model)
    opponent = -3.6 * PAIRS["response_mask"].sum(-1).astype("float32")
    model.fit(PAIRS, opponent, 4, 2, 0)  # as Keras' signature has it
    assert model._recorder is None


def test_few_numbers_of_tokens():
    """Each has graphs of its own."""
    mask = torch.zeros((2, 2, 250), dtype=torch.bool)
    found = set()
    for number in range(1, 1001):
        mask.view(-1)[:number] = True
        rounded = torch_graphs._round_up(mask)
        assert number <= rounded < number + 128
        found.add(rounded)
    assert len(found) <= 8


def test_numbers_are_made_where_they_are_used():
    with torch_graphs._NumbersOnGpu():
        number = torch.as_tensor(True, dtype=torch.int32, device="cpu")
        array = torch.as_tensor(np.ones(2), dtype=torch.float32)
        assert torch.as_tensor(1e39, dtype=torch.float32).isinf()
        assert torch.as_tensor(np.float64(1)).dtype == torch.float64
    assert (number.dtype, number.shape, number.item()) == (torch.int32, (), 1)
    assert array.tolist() == [1.0, 1.0]
