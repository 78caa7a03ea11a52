"""Each metric is tracked once, whatever was compiled before."""

import keras
import numpy as np
import pytest
from tiny_models import make_causal_lm, make_pairs

import keras_iris
from keras_iris.metrics import Margin, PairMetric, RealNLL, self_play_metrics
from keras_iris.metrics.monitor import step_values

PAIRS, OPPONENT = make_pairs(), np.full((8, 2), -20.0, "float32")
NAMES = {"loss", *(metric.name for metric in self_play_metrics())}


def _compiled(metrics, model=None, **options):
    model = model or keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
    model.compile("sgd", keras_iris.losses.IRIS(), metrics=metrics, **options)
    return model


def _fit(model, **options):
    return model.fit(
        PAIRS, OPPONENT, batch_size=4, verbose=0, **options
    ).history


def test_evaluate_returns_as_many_numbers_as_it_names():
    model = _compiled([Margin(), "mse", RealNLL()])
    values = model.evaluate(PAIRS, OPPONENT, verbose=0)
    logs = model.evaluate(PAIRS, OPPONENT, verbose=0, return_dict=True)
    assert set(model.metrics_names) == set(logs) and len(values) == 4
    assert dict(zip(model.metrics_names, values, strict=True)) == logs
    assert len(model.metrics) == len(set(map(id, model.metrics)))


def test_nothing_is_left_of_an_earlier_compile():
    model = _compiled(self_play_metrics())
    assert set(_fit(model)) == NAMES
    for metrics in (["mse"], [Margin()], None):
        names = {getattr(m, "name", m) for m in metrics or []} | {"loss"}
        assert set(_fit(_compiled(metrics, model))) == names
        num_values = np.size(model.evaluate(PAIRS, OPPONENT, verbose=0))
        assert num_values == len(names)
    variables = [id(variable) for variable in model.metrics_variables]
    assert len(variables) == len(set(variables))


def test_metrics_that_are_added_after_a_fit():
    model = _compiled([Margin()])
    _fit(model)
    model.add_metrics(self_play_metrics())
    model.add_metrics(self_play_metrics())
    assert set(_fit(model)) == NAMES
    assert len(model.metrics_names) == len(NAMES)


def test_the_logs_of_every_batch_carry_them():
    model = _compiled(self_play_metrics())
    model.gap.assign(0.25)
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(dict(logs))
    )
    _fit(model, callbacks=[callback], shuffle=False)
    assert [set(logs) for logs in seen] == [NAMES] * 2
    values = step_values(model.recent.latest())
    # The mean over two batches, the second of which is seen on the host.
    for name in ("margin", "real_ess"):
        second = 2 * float(seen[1][name]) - float(seen[0][name])
        assert second == pytest.approx(values[name], rel=1e-3, abs=1e-3)
    assert float(seen[1]["alpha"]) == 1.0
    assert float(seen[1]["gap"]) == 0.25


class SumOfWeights(PairMetric):
    """A user's own."""

    default_name = "weights"

    def terms(self, batch):
        return keras.ops.sum(batch.sample_weight), keras.ops.ones(())


def test_a_metric_of_ones_own():
    model = _compiled([SumOfWeights()])
    logs = model.evaluate(
        PAIRS,
        OPPONENT,
        sample_weight=np.arange(8.0),
        batch_size=8,
        verbose=0,
        return_dict=True,
    )
    assert logs["weights"] == 28.0


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="Keras has no steps_per_execution on PyTorch",
)
def test_recent_batches_of_one_execution():
    model = _compiled(None, steps_per_execution=2)
    seen = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            (batch, callback.model.recent.since(0))
        )
    )
    _fit(model, callbacks=[callback], shuffle=False)
    [(_, batches)] = seen
    tokens = [batch.num_tokens for batch in batches]
    np.testing.assert_array_equal(
        np.concatenate(tokens), PAIRS["response_mask"].sum(-1)
    )
