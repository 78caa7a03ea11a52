"""Two tiny real tokenizers, as checkpoints have them."""

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from keras_iris.data import Tokenizer

SPECIAL = [
    "<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<bos>", "<eos>", "<start_of_turn>",
    "<end_of_turn>",
]  # fmt: skip
# How Llama 3's tokenizer.json cuts a text into words.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "The capital of France is Paris. What is the capital of France?",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))",
    "### Instruction: Hello there, how are you?\n\n### Response: fine",
    "user assistant system model Hello Hi there <|user|> <|assistant|>",
] * 3


def make_tokenizer(inner):
    """A `Tokenizer` that keeps the `tokenizers.Tokenizer` it is made of."""
    ends = ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"]
    tokenizer = Tokenizer(
        inner.to_str(),
        end_token_ids=map(inner.token_to_id, ends),
        pad_token_id=0,
    )
    tokenizer.inner = inner
    return tokenizer


def _train(inner, **options):
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False, **options
    )
    inner.train_from_iterator(CORPUS, trainer)
    return inner


@pytest.fixture(scope="session")
def byte_level():
    """Byte-level BPE, like Llama 3's and Qwen's."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(inner, initial_alphabet=alphabet)


@pytest.fixture(scope="session")
def metaspace():
    """BPE that puts a space before a text, like Mistral's."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = ["😀", *map(chr, range(10, 127))]
    return _train(inner, initial_alphabet=alphabet)


@pytest.fixture(params=["byte_level", "metaspace"])
def any_tokenizer(request):
    return make_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture
def tokenizer(byte_level):
    return make_tokenizer(byte_level)


@pytest.fixture
def as_transformers():
    """Wraps a tokenizer as transformers does."""

    def wrap(tokenizer, template):
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.inner,
            bos_token=template.bos_token or None,
            eos_token=template.eos_token or None,
            chat_template=template.source,
        )

    return wrap
