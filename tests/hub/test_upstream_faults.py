"""Faults of KerasHub 0.32 and Keras 3.15 that keras_iris works around.

A test that fails here is good news: upstream is right, and the workaround
named in the test can go.
"""

import keras
import keras_hub
import numpy as np
import pytest
from reference import expected_logits, expected_tokenizer, random_ids
from tiny_checkpoints import copy, edit
from tokenizer_texts import TEXTS

from keras_iris.hub.checkpoint import read_json

WRONG = 1e-3


def convert(folder, **options):
    """What KerasHub's own converter makes of a folder."""
    return keras_hub.models.Backbone.from_preset(str(folder), **options)


def logits_of(backbone, token_ids):
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    logits = backbone.token_embedding(backbone(inputs), reverse=True)
    return keras.ops.convert_to_numpy(logits)


def difference(folder):
    token_ids = random_ids()
    logits = logits_of(convert(folder, dtype="float32"), token_ids)
    return np.abs(logits - expected_logits(folder, token_ids)).max()


def test_llama_converter_drops_the_epsilon(checkpoint):
    """`make_causal_lm` builds Llama itself."""
    folder = checkpoint("llama")
    epsilon = read_json(folder / "config.json")["rms_norm_eps"]
    assert convert(folder, load_weights=False).layer_norm_epsilon != epsilon


def test_llama_converter_drops_the_new_rotary_scaling(checkpoint, tmp_path):
    """`DecoderConfig` reads transformers 5's `rope_parameters`."""
    folder = copy(checkpoint("llama"), tmp_path)
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    edit(folder / "config.json", rope_parameters=scaling)
    backbone = convert(folder, load_weights=False)
    assert backbone.rope_frequency_adjustment_factor is None


def test_mistral_converter_rounds_to_float16(checkpoint):
    """`Weight.assign` keeps float32."""
    assert difference(checkpoint("mistral")) > 10 * 1e-5


def test_qwen_ignores_the_sliding_window(checkpoint, tmp_path):
    """`DecoderConfig` refuses it."""
    folder = copy(checkpoint("qwen2"), tmp_path)
    window = dict(use_sliding_window=True, sliding_window=8, layer_types=None)
    edit(folder / "config.json", max_window_layers=0, **window)
    assert difference(folder) > WRONG


def test_gemma_ignores_the_epsilon(checkpoint):
    """`DecoderConfig` refuses another than the layers' 1e-6."""
    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=10,
        num_layers=1,
        num_query_heads=1,
        num_key_value_heads=1,
        hidden_dim=4,
        intermediate_dim=8,
        head_dim=4,
        layer_norm_epsilon=1e-2,
    )
    norm = backbone.transformer_layers[0].pre_attention_norm
    assert norm.epsilon == 1e-6


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_byte_pair_tokenizers_split_nothing(checkpoint, architecture):
    """`convert_keras_hub` makes them anew."""
    folder = checkpoint(architecture)
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(str(folder))
    expected = expected_tokenizer(folder)
    texts = [text for text in TEXTS if text]
    same = [
        expected(text, add_special_tokens=False).input_ids
        == np.asarray(tokenizer(text)).tolist()
        for text in texts
    ]
    assert not all(same)


def test_qwen_exporter_names_no_class(checkpoint, tmp_path):
    """`export` writes config.json itself."""
    backbone = convert(checkpoint("qwen2"))
    backbone.export_to_transformers(str(tmp_path))
    assert "architectures" not in read_json(tmp_path / "config.json")


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_quantized_embeddings_have_no_gradient():
    """`load` leaves embeddings in float."""
    embedding = keras.layers.ReversibleEmbedding(64, 16)
    embedding.build((None,))
    embedding.quantize("int8")
    shift = _Shift()
    inputs = keras.Input((16,))
    outputs = _Reverse(embedding)(shift(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.SGD(1.0),
        keras.losses.MeanSquaredError(),
        jit_compile=False,
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(1, 16)), rng.normal(size=(1, 64))
    model.train_on_batch(x, y)
    step = keras.ops.convert_to_numpy(shift.shift)
    # Only through the scale, which is that of the largest input.
    assert np.count_nonzero(step) <= 1


class _Shift(keras.layers.Layer):
    def build(self, input_shape):
        self.shift = self.add_weight(shape=(16,), initializer="zeros")

    def call(self, inputs):
        return inputs + self.shift


class _Reverse(keras.layers.Layer):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.embedding.trainable = False
        self.built = True

    def call(self, inputs):
        return self.embedding(inputs, reverse=True)
