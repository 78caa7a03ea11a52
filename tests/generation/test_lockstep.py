"""What can't decode is known before anything is trained."""

import keras_hub
import pytest
from tiny_models import make_causal_lm

from keras_iris.generation import KerasEngine


class _TakesImages(keras_hub.models.GemmaCausalLM):
    def call_with_cache(self, token_ids, cache, cache_update_index, images):
        raise AssertionError("never called without images")


def test_a_pass_that_needs_more_than_token_ids():
    backbone = make_causal_lm("gemma", num_layers=1).backbone
    causal_lm = _TakesImages(backbone=backbone, preprocessor=None)
    with pytest.raises(ValueError, match="_TakesImages can't generate in this"):
        KerasEngine(
            causal_lm, end_token_ids=(1,), max_new_tokens=1, batch_size=1
        )
