"""Rows to token ids to padded batches. Knows no model.

Importing it takes neither `datasets` nor Jinja nor `tokenizers`.
"""

from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import (
    Conversation,
    Message,
    read_conversations,
)
from keras_iris.data.example import Example, check_vocabulary, read_examples
from keras_iris.data.hub_tokenizer import HubTokenizer
from keras_iris.data.pairs import PairDataset, pad_pairs
from keras_iris.data.sources import cmudict, load_dataset
from keras_iris.data.symbol_tokenizer import SymbolTokenizer
from keras_iris.data.token_cache import cached_tokenize
from keras_iris.data.tokenize import encode_prompt, tokenize
from keras_iris.data.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Conversation",
    "Example",
    "HubTokenizer",
    "Message",
    "PairDataset",
    "SymbolTokenizer",
    "Tokenizer",
    "cached_tokenize",
    "check_vocabulary",
    "cmudict",
    "encode_prompt",
    "load_dataset",
    "pad_pairs",
    "read_conversations",
    "read_examples",
    "tokenize",
]
