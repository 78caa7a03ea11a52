"""Models and data of the benchmarks: the Qwen 2 architecture, random weights.

Nothing is imported at the top that has a backend: the workers of peers don't
pay for Keras, nor ours for transformers.
"""

import harness
import numpy as np

# 41.6 million parameters.
SMALL = {
    "vocabulary": 32_000,
    "layers": 8,
    "width": 512,
    "heads": 8,
    "key_value_heads": 8,
    "inner_width": 1_376,
}
# SmolLM2-135M, but for Qwen 2's biases: 134.5 million parameters.
SMOLLM2 = {
    "vocabulary": 49_152,
    "layers": 30,
    "width": 576,
    "heads": 9,
    "key_value_heads": 3,
    "inner_width": 1_536,
}
# 494 million parameters, of which 136 million are the embeddings.
QWEN = {
    "vocabulary": 151_936,
    "layers": 24,
    "width": 896,
    "heads": 14,
    "key_value_heads": 2,
    "inner_width": 4_864,
}
TINY = {
    "vocabulary": 512,
    "layers": 2,
    "width": 64,
    "heads": 4,
    "key_value_heads": 2,
    "inner_width": 96,
}


def keras_model(sizes, dtype="float32"):
    """A KerasHub causal LM with random weights."""
    import keras_hub

    backbone = keras_hub.models.QwenBackbone(
        vocabulary_size=sizes["vocabulary"],
        num_layers=sizes["layers"],
        num_query_heads=sizes["heads"],
        num_key_value_heads=sizes["key_value_heads"],
        hidden_dim=sizes["width"],
        intermediate_dim=sizes["inner_width"],
        rope_max_wavelength=10_000,
        layer_norm_epsilon=1e-6,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    return keras_hub.models.QwenCausalLM(backbone=backbone, preprocessor=None)


def transformers_config(sizes):
    """The same architecture for transformers."""
    import transformers

    return transformers.Qwen2Config(
        vocab_size=sizes["vocabulary"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["key_value_heads"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["inner_width"],
        max_position_embeddings=2_048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def step_flops(sizes, batch):
    """Operations of a step's matrix products, forward and backward.

    Those that the result needs: logits of responses only, causal attention's
    half, nothing computed twice.

    Args:
        sizes: Of the model.
        batch: `pairs`, `length` and `prompt_length`.
    """
    width, inner = sizes["width"], sizes["inner_width"]
    shared = width * sizes["key_value_heads"] // sizes["heads"]
    layer = 2 * width * width + 2 * width * shared + 3 * width * inner
    layer += width * batch["length"]  # scores and averages, half of each
    rows = 2 * batch["pairs"]
    tokens = rows * batch["length"]
    answers = rows * (batch["length"] - batch["prompt_length"])
    head = width * sizes["vocabulary"]
    return 6 * (tokens * sizes["layers"] * layer + answers * head)


def random_rows(num_pairs, length, vocabulary):
    """Token ids of shape `(num_pairs, 2, length)`, one prompt a pair."""
    shape = (num_pairs, 2, length)
    return np.random.default_rng(0).integers(5, vocabulary, shape)


def pair_dataset(token_ids, prompt_length, batch_size):
    """Full-length pairs as a `keras_iris.data.PairDataset`."""
    from keras_iris.data import Example, PairDataset

    prompts = token_ids[:, 0, :prompt_length]
    real, synthetic = (token_ids[:, i, prompt_length:] for i in (0, 1))
    return PairDataset(
        [Example(p, r) for p, r in zip(prompts, real, strict=True)],
        list(synthetic),
        opponent(len(token_ids), prompt_length, token_ids.shape[2]),
        batch_size=batch_size,
        bucket_lengths=(token_ids.shape[2],),
        shuffle=False,
    )


def opponent(num_pairs, prompt_length, length):
    """The same log-probs for all: 10 nats a token, of shape `(pairs, 2)`."""
    value = -10.0 * (length - prompt_length)
    return np.full((num_pairs, 2), value, "float32")


def number_tokenizer(vocabulary):
    """A tokenizer whose words are the numbers of the ids."""
    import tokenizers
    import transformers

    words = {str(number): number for number in range(vocabulary)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(words, unk_token="0")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="1", pad_token="2", unk_token="0"
    )


def step_memory_mb(model, data):
    """The memory of a train step in MB, its gradients included.

    XLA's temporary memory on JAX, elsewhere the peak of the resident memory
    above what it was before the step.

    Args:
        model: A compiled `keras.Model` that has made a step.
        data: The batch.
    """
    import keras

    if keras.backend.backend() == "jax":
        return _temporary_mb(model, data)
    return harness.memory_above(lambda: model.train_on_batch(*data))[0]


def _temporary_mb(model, data):
    import jax

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in group] for group in groups)
    step = jax.jit(model.train_step, donate_argnums=0)
    compiled = step.lower(state, data).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6
