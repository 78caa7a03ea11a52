"""What transformers says about a folder."""

import numpy as np
import torch
import transformers
from keras import ops


def random_ids(shape=(2, 40), seed=0):
    return np.random.default_rng(seed).integers(10, 600, shape).astype("int32")


def logits_of(causal_lm, token_ids):
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return ops.convert_to_numpy(ops.cast(causal_lm(inputs), "float32"))


def expected_model(folder, dtype="float32"):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    )
    return model.eval()


def expected_logits(folder, token_ids, dtype="float32"):
    with torch.no_grad():
        inputs = torch.tensor(token_ids.astype("int64"))
        return expected_model(folder, dtype)(inputs).logits.float().numpy()


def expected_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)
