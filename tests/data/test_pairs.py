import keras
import numpy as np
import pytest

from keras_iris.data import Example, PairDataset, pad_pairs
from keras_iris.data.buckets import choose_bucket_lengths

PAD = 9


def make(num_examples, *, seed=0, longest=40, **options):
    """A dataset whose tokens tell example, kind and position."""
    generator = np.random.default_rng(seed)
    examples, synthetic = [], []
    for index in range(num_examples):
        lengths = generator.integers(1, longest, 3)
        prompt, real, fake = (
            np.full(length, 1000 * kind + index, np.int32)
            for kind, length in enumerate(lengths, start=1)
        )
        examples.append(Example(prompt, real))
        synthetic.append(fake)
    options = {"batch_size": 4, "pad_token_id": PAD, **options}
    return examples, synthetic, PairDataset(examples, synthetic, **options)


def all_indices(dataset):
    return np.stack([dataset.indices(i) for i in range(len(dataset))])


def test_padded_pair_by_hand():
    example = Example(np.array([5, 6], np.int32), np.array([7, 1], np.int32))
    x = pad_pairs([example], [np.array([8], np.int32)], 5, PAD)
    assert x["token_ids"].tolist() == [[[5, 6, 7, 1, 9], [5, 6, 8, 9, 9]]]
    assert x["padding_mask"].astype(int).tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    ]
    assert x["response_mask"].astype(int).tolist() == [
        [[0, 0, 1, 1, 0], [0, 0, 1, 0, 0]]
    ]
    assert [x[k].dtype for k in x] == [np.int32, bool, bool]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_examples", [4, 5, 23, 400])
def test_batches_hold_each_example_once(num_examples, shuffle):
    log_probs = np.random.default_rng(1).normal(size=(num_examples, 2))
    examples, synthetic, dataset = make(
        num_examples, opponent_log_probs=log_probs, shuffle=shuffle
    )
    seen = []
    for batch_index in range(len(dataset)):
        x, y, sample_weight = dataset[batch_index]
        indices = dataset.indices(batch_index)
        assert (y.dtype, sample_weight.dtype) == (np.float32, np.float32)
        assert y.shape == (4, 2)
        assert x["token_ids"].shape == (4, 2, x["token_ids"].shape[2])
        np.testing.assert_array_equal(sample_weight, indices >= 0)
        for row, index in enumerate(indices):
            if index < 0:  # a copy of the first row
                for array in (*x.values(), y):
                    np.testing.assert_array_equal(array[row], array[0])
                continue
            seen.append(index)
            np.testing.assert_allclose(y[row], log_probs[index], rtol=1e-6)
            responses = (examples[index].response_ids, synthetic[index])
            for column, response in enumerate(responses):
                ids, padding, mask = (
                    x[k][row, column]
                    for k in ("token_ids", "padding_mask", "response_mask")
                )
                prompt = examples[index].prompt_ids
                np.testing.assert_array_equal(ids[mask], response)
                np.testing.assert_array_equal(ids[padding & ~mask], prompt)
                assert set(ids[~padding]) <= {PAD}
                assert padding.sum() == len(prompt) + len(response)
                assert (np.diff(padding.astype(int)) <= 0).all()
    assert sorted(seen) == list(range(num_examples))
    assert len(dataset) == -(-num_examples // 4)


def test_few_shapes_and_little_padding():
    _, _, dataset = make(2000, longest=200, batch_size=16)
    shapes, real, total = set(), 0, 0
    for x, _, _ in dataset:
        shapes.add(x["token_ids"].shape)
        real += x["padding_mask"].sum()
        total += x["padding_mask"].size
    assert len(shapes) == 4
    assert all(shape[2] % 8 == 0 for shape in shapes)
    _, _, fixed = make(2000, longest=200, batch_size=16, bucket_lengths=[400])
    fixed_total = sum(x["padding_mask"].size for x, _, _ in fixed)
    assert total < 0.75 * fixed_total
    assert real == sum(x["padding_mask"][w > 0].sum() for x, _, w in fixed)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 5], (8,)),
        ([1, 9, 17, 25, 33], (16, 24, 32, 40)),
        ([255, 256, 257], (256, 320)),
        ([1000], (1024,)),
    ],
)
def test_bucket_lengths(lengths, expected):
    assert choose_bucket_lengths(np.array(lengths)) == expected


def test_order_depends_on_seed_and_epoch_only():
    *_, dataset = make(50, seed=3, epoch=2)
    np.random.seed(0)
    keras.utils.set_random_seed(5)
    *_, again = make(50, seed=3, epoch=2)
    np.testing.assert_array_equal(all_indices(dataset), all_indices(again))
    examples, synthetic, _ = make(50)
    other = PairDataset(examples, synthetic, batch_size=4, seed=1, epoch=2)
    orders = [all_indices(again)]
    orders.append(all_indices(other))
    again.epoch = 3
    orders.append(all_indices(again))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    *_, resumed = make(50, seed=3, epoch=3)
    np.testing.assert_array_equal(all_indices(resumed), orders[2])
    # Nothing changes it any more.
    fixed = again.at_epoch(2)
    again.epoch = 4
    np.testing.assert_array_equal(all_indices(fixed), orders[0])


def test_order_of_rows_of_one_length_by_hand():
    rows = [np.ones(3, np.int32)] * 12
    dataset = PairDataset(
        [Example(row, row) for row in rows],
        rows,
        batch_size=4,
        seed=4,
        epoch=1,
    )
    generator = np.random.default_rng([4, 1])
    batches = generator.permutation(12).reshape(3, 4)
    np.testing.assert_array_equal(
        all_indices(dataset), generator.permutation(batches)
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_pairs_of_an_example_are_in_one_batch(shuffle):
    num_examples, num_samples = 23, 3
    examples, first, _ = make(num_examples)
    _, others, _ = make(num_examples, seed=1)
    synthetic = [
        np.append(ids, np.int32(sample))
        for real, other in zip(first, others, strict=True)
        for sample, ids in enumerate((real, other, real[:1]))
    ]
    log_probs = np.arange(2.0 * len(synthetic)).reshape(-1, 2)
    dataset = PairDataset(
        examples,
        synthetic,
        log_probs,
        batch_size=12,
        num_samples=num_samples,
        shuffle=shuffle,
    )
    assert len(dataset) == 6  # 4 examples in each, 3 in one
    orders = []
    for dataset.epoch in range(2):
        seen = []
        for x, y, weight in (dataset[i] for i in range(len(dataset))):
            assert x["token_ids"].shape[:2] == (12, 2)
            numbers = np.flatnonzero(weight)
            assert len(numbers) in (12, 9)
            for row in numbers:
                pair = int(y[row, 0] / 2)
                example = examples[pair // num_samples]
                responses = (example.response_ids, synthetic[pair])
                for column, response in enumerate(responses):
                    ids, mask = (
                        x[name][row, column]
                        for name in ("token_ids", "response_mask")
                    )
                    np.testing.assert_array_equal(ids[mask], response)
                seen.append(pair)
        groups = np.reshape(seen, (num_examples, num_samples))
        assert sorted(groups[:, 0] // num_samples) == list(range(num_examples))
        np.testing.assert_array_equal(groups - groups[:, :1], [[0, 1, 2]] * 23)
        orders.append(seen)
        indices = all_indices(dataset)
        assert indices[indices >= 0].tolist() == seen
        assert (indices >= -1).all()
    assert (orders[0] == orders[1]) == (not shuffle)


def test_without_shuffling_no_epoch_changes_the_order():
    *_, dataset = make(50, shuffle=False)
    before = all_indices(dataset)
    dataset.epoch += 1
    np.testing.assert_array_equal(all_indices(dataset), before)


def test_zeros_stand_for_missing_log_probs():
    *_, dataset = make(8)
    assert not dataset[0][1].any()


def example(*token_ids):
    return Example(np.array(token_ids, np.int32), np.array([1], np.int32))


ONE = np.array([1], np.int32)
EMPTY = np.array([], np.int32)
NAN = np.array([[0.0, 1.0], [np.nan, 0.0], [0.0, -np.inf]])


@pytest.mark.parametrize(
    ("num_examples", "options", "error"),
    [
        (3, {"batch_size": 0}, "`batch_size` .* at least 1. Received: 0"),
        (3, {"num_samples": 0}, "`num_samples` .* at least 1. Received: 0"),
        (3, {"num_samples": 4}, "multiple of num_samples=4, .* Received: 2"),
        (3, {"num_samples": 2}, "3 synthetic responses, expected 2 for each"),
        (3, {"batch_size": 4}, "3 pairs, fewer than batch_size=4. Lower"),
        (0, {"batch_size": 1}, "0 pairs, fewer"),
        (3, {"synthetic": [ONE]}, "3 examples and 1 synthetic"),
        (3, {"synthetic": [ONE, ONE, EMPTY]}, "synthetic response of exa.* 2"),
        (3, {"opponent_log_probs": NAN}, r"NaN.* 2 rows, first in \[1, 2\]"),
        (3, {"opponent_log_probs": NAN[0]}, r"\(3, 2\), received \(2,\)"),
        (3, {"bucket_lengths": [8, 4]}, r"increasing.*\(8, 4\)"),
        (3, {"bucket_lengths": [2]}, "has 3 tokens, expected at most 2"),
    ],
)
def test_bad_arguments(num_examples, options, error):
    arguments = {
        "synthetic": [ONE] * num_examples,
        "batch_size": 2,
        **options,
    }
    with pytest.raises(ValueError, match=error):
        PairDataset([example(3, 4)] * num_examples, **arguments)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt of example 1 is empty"):
        PairDataset([example(3), example()], [ONE, ONE], batch_size=1)


def test_a_pair_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="Pair 0 has 3 tokens, .* = 2"):
        pad_pairs([example(3, 4)], [ONE], 2)


def test_annotated_responses_alone():
    examples = [Example(np.arange(1, 4), np.arange(4, 6 + i)) for i in range(3)]
    dataset = PairDataset(examples, None, batch_size=2, shuffle=False)
    pairs = PairDataset(
        examples,
        [example.response_ids for example in examples],
        batch_size=2,
        shuffle=False,
    )
    assert dataset.num_responses == 1 and len(dataset) == 2
    for batch, expected in zip(dataset, pairs, strict=True):
        for name, array in batch[0].items():
            np.testing.assert_array_equal(array, expected[0][name][:, :1])
        assert batch[1].shape == (2, 1)
        np.testing.assert_array_equal(batch[2], expected[2])
