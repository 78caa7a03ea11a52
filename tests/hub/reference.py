"""What transformers says about a folder."""

import numpy as np
import torch
import transformers
from keras import ops

from keras_iris.generation import KerasEngine


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
    return logits_from(expected_model(folder, dtype), token_ids)


def logits_from(model, token_ids):
    with torch.no_grad():
        inputs = torch.tensor(token_ids.astype("int64"))
        return model(inputs).logits.float().numpy()


def expected_tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_greedy(causal_lm, folder, num_tokens):
    """The most probable tokens after two prompts are those of transformers."""
    engine = KerasEngine(
        causal_lm,
        end_token_ids=(639,),
        max_new_tokens=num_tokens,
        batch_size=2,
        bucket_lengths=(12,),
        temperature=0,
    )
    prompts = [random_ids((n,), seed=n).tolist() for n in (12, 7)]
    completions = engine.generate(prompts, seed=0)
    model = expected_model(folder)
    model.generation_config.eos_token_id = None
    model.config.output_router_logits = False  # they fail with a cache
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        ).numpy()[0, len(prompt) :]
        assert 639 not in expected
        assert list(completion.token_ids) == expected.tolist()


def take_step(model, pairs):
    """One step of SGD on the annotated responses, at a rate of 0.1."""
    ids, mask, padding = (
        torch.tensor(pairs[name][:, 0].astype("int64"))
        for name in ("token_ids", "response_mask", "padding_mask")
    )
    logits = model(ids, attention_mask=padding).logits
    log_probs = torch.log_softmax(logits[:, :-1], -1)
    log_probs = log_probs.gather(2, ids[:, 1:, None])[..., 0]
    (-(log_probs * mask[:, 1:]).sum() / len(ids)).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
