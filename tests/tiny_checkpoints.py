"""Tiny random checkpoints, saved by transformers, with tokenizers of their own.

Each architecture has its real tokenizer's type: byte-level BPE behind the
real pre-tokeniser (Qwen2, Llama 3), or SentencePiece BPE with byte fallback
(Mistral, Gemma), trained on the texts of `tokenizer_texts.py`.
"""

import io
import json
import shutil

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizer_texts import TEXTS
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

transformers.utils.logging.disable_progress_bar()

VOCABULARY_SIZE = 640

# The published split expressions of Llama 3 and of Qwen2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token "
    "+ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] "
    "+ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

_SIZES = dict(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


def save_checkpoint(folder, architecture, seed=0, dtype="float32", **options):
    """Writes a tiny checkpoint: weights, tokenizer, template, configs."""
    torch.manual_seed(seed)
    model_class, config_class, tokenizer, defaults = find_classes(architecture)
    sizes = {} if "text_config" in defaults else _SIZES
    config = config_class(**{**sizes, **defaults, **options})
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            centre = 0.0 if "gemma" in architecture else 1.0
            parameter.data.normal_(centre, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.2)
        else:
            parameter.data.normal_(0, 0.08)
    model.generation_config.eos_token_id = END_IDS[tokenizer]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    if architecture in _PUBLISHED:
        _PUBLISHED[architecture](folder)
    _TOKENIZERS[tokenizer](folder)
    return folder


def find_classes(architecture):
    """Its classes in transformers, its tokenizer and options of its config."""
    tokenizer, options = {**_MODELS, **_OTHERS}[architecture]
    config_class = transformers.CONFIG_MAPPING[architecture]
    classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if "text_config" in options:
        classes = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model_class = classes[config_class]
    return model_class, config_class, tokenizer, options


def non_default_options(architecture):
    """Of the config: no entry that the model reads has its default."""
    options = dict(NON_DEFAULT)
    if architecture in _ROPES:
        options["rope_parameters"] = _ROPES[architecture]
    if architecture in ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        options["tie_word_embeddings"] = True
    if "mixtral" in architecture or "moe" in architecture:
        options["router_aux_loss_coef"] = 0.25
        options["output_router_logits"] = True
    return options


def copy(folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "copy", dirs_exist_ok=True)


def edit(file, **changes):
    """Changes entries of a JSON file; `None` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    content = {k: v for k, v in content.items() if v is not None}
    file.write_text(json.dumps(content))


def _save_qwen2_tokenizer(folder):
    _save_byte_level(
        folder,
        digits="",
        normalizer=normalizers.NFC(),
        special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        config=dict(
            tokenizer_class="Qwen2Tokenizer",
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            chat_template=_CHATML,
        ),
    )


def _save_llama3_tokenizer(folder):
    _save_byte_level(
        folder,
        digits="{1,3}",
        normalizer=None,
        special=[
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        config=dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            chat_template=_LLAMA3,
        ),
    )


def _save_byte_level(folder, *, digits, normalizer, special, config):
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=bool(digits)))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(_WORDS % digits), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 8,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)


def _save_mistral_tokenizer(folder):
    save_sentencepiece(folder, add_dummy_prefix=True)
    config = dict(
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        add_eos_token=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        legacy=True,
        clean_up_tokenization_spaces=False,
        chat_template=_ZEPHYR,
    )
    _write_json(folder / "tokenizer_config.json", config)
    _add_tokenizer_json(folder)
    # As Mistral's and Zephyr's published files have it.
    definition = json.loads((folder / "tokenizer.json").read_text())
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {
        "type": "Replace",
        "pattern": {"String": " "},
        "content": "\u2581",
    }
    definition |= {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
    }
    _write_json(folder / "tokenizer.json", definition)


def _save_gemma_tokenizer(folder):
    save_sentencepiece(
        folder,
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    config = dict(
        tokenizer_class="GemmaTokenizer",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=_GEMMA,
    )
    _write_json(folder / "tokenizer_config.json", config)
    _add_tokenizer_json(folder)


def save_sentencepiece(folder, **options):
    """Trains `tokenizer.model`."""
    model = io.BytesIO()
    defaults = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            line for text in TEXTS for line in text.splitlines() if line
        ),
        model_writer=model,
        vocab_size=VOCABULARY_SIZE - 8,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
        **{**defaults, **options},
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _add_tokenizer_json(folder):
    # What transformers makes of tokenizer.model, as in published folders.
    # By the class of its name: for a folder of type mistral `AutoTokenizer`
    # gives other ids with each version.
    config = (folder / "tokenizer_config.json").read_text()
    factory = getattr(transformers, json.loads(config)["tokenizer_class"])
    factory.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(config)


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2))


_GEMMA2 = dict(
    head_dim=24,
    sliding_window=5,
    layer_types=["full_attention", "sliding_attention"],
    query_pre_attn_scalar=40,
    final_logit_softcapping=3.0,
)
_EXPERTS = dict(
    num_experts=5,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    moe_intermediate_size=12,
)
# The tokenizer, and options of the config.
_MODELS = {
    "mistral": (
        "mistral",
        dict(rms_norm_eps=1e-5, sliding_window=8, head_dim=24),
    ),
    "qwen2": ("qwen2", dict(rms_norm_eps=1e-6, tie_word_embeddings=True)),
    "llama": ("llama", dict(rms_norm_eps=1e-3, tie_word_embeddings=True)),
    "gemma": ("gemma", dict(head_dim=24)),
    "gemma2": ("gemma", dict(attn_logit_softcapping=2.0, **_GEMMA2)),
    "gemma3_text": ("gemma", _GEMMA2),
    "mixtral": (
        "mistral",
        dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=6),
    ),
    "qwen2_moe": (
        "qwen2",
        dict(shared_expert_intermediate_size=20, **_EXPERTS),
    ),
    "qwen3": ("qwen2", dict(head_dim=24)),
    "qwen3_moe": (
        "qwen2",
        dict(
            head_dim=24, mlp_only_layers=[0], decoder_sparse_step=2, **_EXPERTS
        ),
    ),
    "smollm3": ("qwen2", dict(no_rope_layers=[0, 1], pad_token_id=0)),
}
# Of architectures without a row.
_TEXT = dict(head_dim=16, **_SIZES)
_VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
_LINEAR = dict(
    num_hidden_layers=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
_GEMMA4 = dict(
    head_dim=16,
    global_head_dim=16,
    vocab_size_per_layer_input=VOCABULARY_SIZE,
    hidden_size_per_layer_input=8,
)
_OTHERS = {
    "gemma3": (
        "gemma",
        dict(text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4),
    ),
    "gemma4_text": ("gemma", _GEMMA4),
    "gpt2": (
        "qwen2",
        dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    ),
    "gpt_oss": (
        "qwen2",
        dict(
            head_dim=16,
            num_local_experts=4,
            quantization_config={"quant_method": "mxfp4"},
        ),
    ),
    "phi3": ("qwen2", dict(pad_token_id=0, eos_token_id=0)),
    "qwen3_5": (
        "qwen2",
        dict(
            text_config=_TEXT | _LINEAR,
            vision_config=dict(
                depth=1, hidden_size=16, num_heads=2, out_hidden_size=64
            ),
        ),
    ),
    "qwen3_5_text": ("qwen2", dict(head_dim=16, **_LINEAR)),
}
OTHERS = tuple(_OTHERS)


def _publish_gemma3(folder):
    file, name = folder / "model.safetensors", "vision_tower."
    arrays = load_file(file)
    inner = f"{name}vision_model."
    save_file({k.replace(name, inner): a for k, a in arrays.items()}, file)


def _publish_gpt_oss(folder):
    """Experts in MXFP4: 4 bits for a number, 8 for the exponent of each 32."""
    rng = np.random.default_rng(0)
    arrays = load_file(folder / "model.safetensors")
    for name in [n for n in arrays if n.endswith("_proj")]:
        experts, inputs, outputs = arrays.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = rng.integers(0, 256, (*shape, 16), "uint8")
        arrays[f"{name}_blocks"] = blocks
        arrays[f"{name}_scales"] = rng.integers(120, 124, shape, "uint8")
    save_file(arrays, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    scaling = dict(config["rope_parameters"])
    theta = scaling.pop("rope_theta")
    rope = dict(rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    edit(folder / "config.json", **rope)


# What is published is written in another way than transformers 5 does.
_PUBLISHED = {"gemma3": _publish_gemma3, "gpt_oss": _publish_gpt_oss}
# Values that aren't transformers' defaults, of entries that all have.
NON_DEFAULT = dict(
    hidden_size=32,
    rms_norm_eps=1e-2,
    rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
)
_ROPES = {
    "gemma3_text": {
        "full_attention": NON_DEFAULT["rope_parameters"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
    "smollm3": {"rope_type": "default", "rope_theta": 500.0},
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 16,
    },
}
END_IDS = {
    "mistral": 2,
    "qwen2": [634, 632],
    "llama": [633, 636],
    "gemma": [1, 5],
}
_TOKENIZERS = {
    "mistral": _save_mistral_tokenizer,
    "qwen2": _save_qwen2_tokenizer,
    "llama": _save_llama3_tokenizer,
    "gemma": _save_gemma_tokenizer,
}
