import numpy as np

from keras_iris.generation.batch_plan import (
    DEFAULT_BUCKET_LENGTHS,
    pad_prompts,
    plan_prompts,
)


def test_prompts_of_like_length_go_together():
    plan = plan_prompts([3, 8, 2, 5, 2], {4: 3, 6: 2, 8: 1})
    assert [batch.indices for batch in plan] == [(1,), (3, 0), (2, 4)]
    assert [batch.bucket_length for batch in plan] == [8, 6, 4]
    assert [batch.num_rows for batch in plan] == [1, 2, 3]


def test_prompts_of_one_bucket_wait_in_a_queue():
    lengths = [8, 8, 7, 6, 5, 4, 3, 2, 2, 1]
    plan = plan_prompts(lengths, {4: 1, 8: 1}, waves=16)
    # The first are longer than half of 8; of few, shorter ones come with them.
    assert [len(batch.indices) for batch in plan] == [5, 4, 1]
    assert [batch.bucket_length for batch in plan] == [8, 4, 4]
    plan = plan_prompts(lengths, {4: 1, 8: 1}, waves=3)
    assert [len(batch.indices) for batch in plan] == [3, 3, 3, 1]


def test_shapes_of_many_prompts():
    """Log-normal lengths of mean 180, as in the generation benchmark."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(180) - 0.125, 0.5, 10_000).astype(int) + 1
    plan = plan_prompts(
        lengths.tolist(), dict.fromkeys(DEFAULT_BUCKET_LENGTHS, 32)
    )
    assert sorted(sum((b.indices for b in plan), ())) == list(range(10_000))
    assert len({batch.bucket_length for batch in plan}) <= 8


def test_places_without_a_prompt():
    prompts = [[7, 8], [9]]
    (batch,) = plan_prompts([2, 1], {4: 2}, waves=2)
    arrays = pad_prompts(prompts, batch, pad_token_id=5, waves=2)
    copies = 2 * [[9, 5, 5, 5]]
    assert arrays["prompts"].tolist() == [[7, 8, 5, 5], [9, 5, 5, 5], *copies]
    assert arrays["lengths"].tolist() == [2, 1, 1, 1]
    assert arrays["is_active"].tolist() == [True, True, False, False]
