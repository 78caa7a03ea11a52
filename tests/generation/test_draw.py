"""Ids drawn by noise, against NumPy."""

import keras
import numpy as np
import pytest

from keras_iris.generation.draw import NUMBERS, draw, make_noise

VOCABULARY_SIZE = 1000


def drawn(probabilities, noise):
    ids = draw(*map(keras.ops.convert_to_tensor, (probabilities, noise)))
    return keras.ops.convert_to_numpy(ids)


def expected(probabilities, noise):
    """In float64: groups of 32 ids, then ids, by `searchsorted`."""
    groups = np.pad(probabilities.astype("f8"), (0, 24)).reshape(-1, 32)
    sums = groups.sum(axis=1).cumsum()
    group = np.searchsorted(sums, noise[0] * sums[-1], side="right")
    sums = groups[group].cumsum()
    place = np.searchsorted(sums, noise[1] * sums[-1], side="right")
    return 32 * group + place


def test_ids_are_those_of_the_inverted_distribution_function():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(VOCABULARY_SIZE, 0.1), 500)
    probabilities = probabilities.astype("float32")
    noise = rng.random((500, NUMBERS), "float32")
    ids = drawn(probabilities, noise)
    pairs = zip(probabilities, noise, strict=True)
    # Noise within rounding of a step between two ids is rare.
    assert np.mean(ids != [expected(p, u) for p, u in pairs]) < 0.005


@pytest.mark.parametrize("noise", [0.0, 0.5, 1 - 2**-24])
def test_what_is_impossible_is_never_drawn(noise):
    rng = np.random.default_rng(1)
    weights = rng.random((200, VOCABULARY_SIZE), "float32")
    weights *= rng.random(weights.shape) < 0.02
    weights[:, 500] = 1e-30
    ids = drawn(
        weights / weights.sum(axis=1, keepdims=True),
        np.full((200, NUMBERS), noise, "float32"),
    )
    assert (weights[np.arange(200), ids] > 0).all()


def test_noise_of_a_prompt():
    noise = make_noise(3, place=7, num_draws=4)
    assert noise.shape == (4 * NUMBERS,)
    assert ((noise >= 0) & (noise < 1)).all()
    # What comes later changes nothing of what comes first.
    longer = make_noise(3, place=7, num_draws=9)
    np.testing.assert_array_equal(longer[: len(noise)], noise)
    for seed, place in ((4, 7), (3, 8)):
        assert (make_noise(seed, place, 4) != noise).all()
