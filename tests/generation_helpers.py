"""What tests of real engines share."""

import numpy as np

import keras_iris
from keras_iris.data import Example
from keras_iris.models.score import score_pairs


def trainer_log_probs(causal_lm, prompts, completions):
    """The training forward's log-prob of each completion, in nats."""
    examples = [
        Example(np.array(prompt, "int32"), np.array(c.token_ids, "int32"))
        for prompt, c in zip(prompts, completions, strict=True)
    ]
    scores = score_pairs(
        keras_iris.SelfPlayModel(causal_lm),
        examples,
        [example.response_ids for example in examples],
        batch_size=len(examples),
    )
    return scores[:, 0]
