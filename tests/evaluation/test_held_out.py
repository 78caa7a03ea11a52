import keras
import numpy as np
import pytest

import keras_iris
from keras_iris.data import Example


def test_held_out(checkpoint, tmp_path):
    """NLL against a loop over examples; answers against `argmax`."""
    causal_lm = keras_iris.load(checkpoint("qwen2"), dtype="float32")
    tokenizer = causal_lm.tokenizer
    rows = [("How are you?", "Fine."), ("And you, my friend?", "Very well.")]
    examples = [
        Example(*(np.array(tokenizer.encode(t), "int32") for t in row))
        for row in rows
    ]
    model = keras_iris.SelfPlayModel(causal_lm)
    held_out = keras_iris.evaluation.HeldOut(
        examples, batch_size=2, max_new_tokens=3
    )
    scores = held_out(model)
    total, count = 0.0, 0
    for example, answer in zip(examples, scores.answers, strict=True):
        ids = np.concatenate([example.prompt_ids, example.response_ids])
        log_probs = _log_probs(causal_lm, ids)
        start = len(example.prompt_ids)
        for place in range(start, len(ids)):
            total -= log_probs[place - 1, ids[place]]
            count += 1
        ids = example.prompt_ids
        for _ in range(3):
            ids = np.append(ids, _log_probs(causal_lm, ids)[-1].argmax())
            if ids[-1] in tokenizer.end_token_ids:
                break
        assert answer["answer"] == tokenizer.decode(ids[start:].tolist())
        assert answer["prompt"] == tokenizer.decode(example.prompt_ids)
    np.testing.assert_allclose(scores["nll_per_token"], total / count, 1e-4)
    # Of another model it is the answers of that.
    other = keras_iris.load(checkpoint("mistral"), dtype="float32")
    other = keras_iris.SelfPlayModel(other)
    fresh = keras_iris.evaluation.HeldOut(
        examples, batch_size=2, max_new_tokens=3
    )
    assert held_out(other).answers == fresh(other).answers != scores.answers
    causal_lm.tokenizer = None
    with pytest.raises(ValueError, match="needs a tokenizer"):
        held_out(model)


def _log_probs(causal_lm, ids):
    inputs = {
        "token_ids": np.array([ids], "int32"),
        "padding_mask": np.ones((1, len(ids)), "int32"),
    }
    logits = keras.ops.convert_to_numpy(causal_lm(inputs))[0].astype("float64")
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_held_out_without_examples():
    with pytest.raises(ValueError, match="needs examples .* Received: none"):
        keras_iris.evaluation.HeldOut([], batch_size=8)
