import numpy as np
import pytest

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


def test_shapes_of_many_prompts():
    """Log-normal lengths of mean 180, as in the generation benchmark."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(180) - 0.125, 0.5, 10_000).astype(int) + 1
    plan = plan_prompts(
        lengths.tolist(), dict.fromkeys(DEFAULT_BUCKET_LENGTHS, 32)
    )
    assert sorted(sum((b.indices for b in plan), ())) == list(range(10_000))
    assert len({batch.bucket_length for batch in plan}) <= 8


@pytest.mark.parametrize(
    ("pads_left", "token_ids", "starts"),
    [
        (False, [[7, 8, 5, 5], [9, 5, 5, 5], [9, 5, 5, 5]], [2, 1, 1]),
        (True, [[5, 5, 7, 8], [5, 5, 5, 9], [5, 5, 5, 9]], [4, 4, 4]),
    ],
)
def test_rows_without_a_prompt(pads_left, token_ids, starts):
    prompts = [[7, 8], [9]]
    (batch,) = plan_prompts([2, 1], {4: 3})
    arrays = pad_prompts(prompts, batch, pad_token_id=5, pads_left=pads_left)
    assert arrays["token_ids"].tolist() == token_ids
    assert arrays["is_prompt"].tolist() == (np.array(token_ids) != 5).tolist()
    assert arrays["starts"].tolist() == starts
    assert arrays["is_real"].tolist() == [True, True, False]
