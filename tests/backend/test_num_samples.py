"""Several synthetic responses to a prompt, against the definitions.

The oracle knows no pairs: it weighs each annotated and each synthetic response
once, with weights from NumPy, in a step of Keras' own cross-entropy.
"""

import keras
import numpy as np
import oracles
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.data import Example, PairDataset
from keras_iris.losses import IRIS, SPIN

NUM_EXAMPLES, NUM_SAMPLES, LENGTH = 4, 3, 16
ALPHA, BETA = 1.5, 0.7
TOLERANCE = 1e-5  # float32, relative to the norm of the gradient
LOSS_TOLERANCE = 1e-5  # nats: log-probs are about -30, in float32


def _data():
    rng = np.random.default_rng(0)

    def ids(low, high):
        size = rng.integers(low, high)
        return rng.integers(1, VOCABULARY_SIZE, size).astype("int32")

    examples = [Example(ids(2, 6), ids(2, 9)) for _ in range(NUM_EXAMPLES)]
    synthetic = [ids(1, 9) for _ in range(NUM_EXAMPLES * NUM_SAMPLES)]
    # Near the random model's, about -3.6 nats a token.
    opponent = [
        [-3.6 * len(e.response_ids), -3.6 * len(s)]
        for e, s in zip(
            np.repeat(examples, NUM_SAMPLES), synthetic, strict=True
        )
    ]
    return examples, synthetic, np.array(opponent, "float32")


EXAMPLES, SYNTHETIC, OPPONENT = _data()


def _rows():
    """All responses, each once: annotated, then synthetic."""
    prompts = [e.prompt_ids for e in EXAMPLES]
    pairs = [
        *((e.prompt_ids, e.response_ids) for e in EXAMPLES),
        *((prompts[i // NUM_SAMPLES], s) for i, s in enumerate(SYNTHETIC)),
    ]
    token_ids = np.zeros((len(pairs), LENGTH), "int32")
    padding, response = (np.zeros(token_ids.shape, bool) for _ in range(2))
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        token_ids[row, :end] = [*prompt, *answer]
        padding[row, :end] = True
        response[row, len(prompt) : end] = True
    return token_ids, padding, response


def _iris(real, synthetic):
    """Value, and derivatives in both kinds of log-ratios."""
    return (
        oracles.iris(real, synthetic, ALPHA),
        -oracles.tilted_weights(-real, 1 - ALPHA),
        oracles.tilted_weights(synthetic, ALPHA),
    )


def _spin(real, synthetic):
    margin = real[:, None] - synthetic.reshape(NUM_EXAMPLES, NUM_SAMPLES)
    slope = -BETA / margin.size / (1 + np.exp(BETA * margin))
    value = np.logaddexp(0.0, -BETA * margin).mean()
    return value, slope.sum(axis=1), -slope.ravel()


def _values(variables):
    return [keras.ops.convert_to_numpy(v).copy() for v in variables]


def _expected(causal_lm, objective):
    """Loss of the definition, and the change by a step of size 1."""
    token_ids, padding, response = _rows()
    x = {"token_ids": token_ids, "padding_mask": padding}
    logits = keras.ops.convert_to_numpy(causal_lm(x))
    log_probs = oracles.sequence_log_probs(logits, token_ids, response)
    opponent = [*OPPONENT[::NUM_SAMPLES, 0], *OPPONENT[:, 1]]
    ratios = np.split(log_probs - opponent, [NUM_EXAMPLES])
    loss, *slopes = objective(*ratios)
    # Cross-entropy is minus the log-prob.
    weight = -np.concatenate(slopes)[:, None] * response
    network = keras.Model(causal_lm.inputs, causal_lm.outputs)
    network.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="sum"
        ),
    )
    before = _values(causal_lm.trainable_variables)
    network.train_on_batch(
        {name: array[:, :-1] for name, array in x.items()},
        token_ids[:, 1:],
        sample_weight=weight[:, 1:].astype("float32"),
    )
    after = _values(causal_lm.trainable_variables)
    for variable, value in zip(
        causal_lm.trainable_variables, before, strict=True
    ):
        variable.assign(value)
    return loss, [a - b for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize(
    ("make_loss", "objective"),
    [(lambda: IRIS(ALPHA), _iris), (lambda: SPIN(BETA), _spin)],
    ids=["iris", "spin"],
)
def test_loss_and_gradient_are_those_of_the_definition(make_loss, objective):
    causal_lm = make_causal_lm(num_layers=1)
    start = _values(causal_lm.trainable_variables)
    loss, expected = _expected(causal_lm, objective)
    scale = np.sqrt(sum(np.sum(e.astype("float64") ** 2) for e in expected))
    pairs = PairDataset(
        EXAMPLES,
        SYNTHETIC,
        OPPONENT,
        batch_size=len(SYNTHETIC),
        num_samples=NUM_SAMPLES,
        bucket_lengths=[LENGTH],
    )
    model = keras_iris.SelfPlayModel(causal_lm)
    for size in (2, 5):  # in the middle of an example's pairs
        for variable, value in zip(
            causal_lm.trainable_variables, start, strict=True
        ):
            variable.assign(value)
        model.compile(
            keras.optimizers.SGD(1.0), make_loss(), micro_batch_size=size
        )
        history = model.fit(pairs, verbose=0).history
        assert history["loss"][0] == pytest.approx(loss, abs=LOSS_TOLERANCE)
        changes = _values(causal_lm.trainable_variables)
        for change, value, e in zip(changes, start, expected, strict=True):
            assert np.linalg.norm(change - value - e) < TOLERANCE * scale
