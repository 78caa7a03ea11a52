"""Tiny random checkpoints, saved by transformers, with tokenizers of their own.

Each architecture has its real tokenizer's type: byte-level BPE behind the
real pre-tokeniser (Qwen2, Llama 3), or SentencePiece BPE with byte fallback
(Mistral, Gemma), trained on the texts of `tokenizer_texts.py`.
"""

import io
import json
import shutil

import sentencepiece
import tokenizers
import torch
import transformers
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
    config = config_class(**{**_SIZES, **defaults, **options})
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
    _TOKENIZERS[tokenizer](folder)
    return folder


def find_classes(architecture):
    """Its classes in transformers, its tokenizer and options of its config."""
    name, tokenizer, options = _MODELS[architecture]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    return model_class, model_class.config_class, tokenizer, options


def non_default_options(architecture):
    """Of the config: no entry that the model reads has its default."""
    options = dict(NON_DEFAULT)
    if architecture in _ROPES:
        options["rope_parameters"] = _ROPES[architecture]
    if architecture in ("llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        options["tie_word_embeddings"] = True
    if "mixtral" in architecture or "moe" in architecture:
        options["router_aux_loss_coef"] = 0.25
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
    definition["normalizer"]["normalizers"].insert(
        0, {"type": "Prepend", "prepend": "\u2581"}
    )
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
    config = (folder / "tokenizer_config.json").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(config)


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=2))


_LAYER_TYPES = ["full_attention", "sliding_attention"]
_EXPERTS = dict(num_experts_per_tok=2, norm_topk_prob=True)
# The class in transformers, the tokenizer, and options of the config.
_MODELS = {
    "mistral": (
        "Mistral",
        "mistral",
        dict(rms_norm_eps=1e-5, sliding_window=8, head_dim=24),
    ),
    "qwen2": (
        "Qwen2",
        "qwen2",
        dict(rms_norm_eps=1e-6, tie_word_embeddings=True),
    ),
    "llama": (
        "Llama",
        "llama",
        dict(rms_norm_eps=1e-3, tie_word_embeddings=True),
    ),
    "gemma": ("Gemma", "gemma", dict(head_dim=24)),
    "gemma2": (
        "Gemma2",
        "gemma",
        dict(
            head_dim=24,
            sliding_window=5,
            layer_types=_LAYER_TYPES,
            query_pre_attn_scalar=40,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
    ),
    "gemma3_text": (
        "Gemma3",
        "gemma",
        dict(
            head_dim=24,
            sliding_window=5,
            layer_types=_LAYER_TYPES,
            query_pre_attn_scalar=40,
            final_logit_softcapping=3.0,
        ),
    ),
    "mixtral": (
        "Mixtral",
        "mistral",
        dict(num_local_experts=4, num_experts_per_tok=3, sliding_window=6),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        "qwen2",
        dict(
            num_experts=5,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            **_EXPERTS,
        ),
    ),
    "qwen3": ("Qwen3", "qwen2", dict(head_dim=24)),
    "qwen3_moe": (
        "Qwen3Moe",
        "qwen2",
        dict(
            head_dim=24,
            num_experts=5,
            moe_intermediate_size=12,
            mlp_only_layers=[0],
            decoder_sparse_step=2,
            **_EXPERTS,
        ),
    ),
    "smollm3": (
        "SmolLM3",
        "qwen2",
        dict(no_rope_layers=[0, 1], pad_token_id=0),
    ),
}
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
