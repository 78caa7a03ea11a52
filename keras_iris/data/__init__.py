"""Rows to token ids to padded batches. Knows no model.

Importing it takes neither `datasets` nor Jinja nor `tokenizers`.
"""

from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import Conversation, read_conversations
from keras_iris.data.encoder import encode_prompt
from keras_iris.data.example import Example
from keras_iris.data.pairs import PairDataset, pad_pairs
from keras_iris.data.sources import cmudict, load_dataset
from keras_iris.data.tokenize import tokenize
from keras_iris.data.tokenizer import SymbolTokenizer, Tokenizer

__all__ = [
    "ChatTemplate",
    "Conversation",
    "Example",
    "PairDataset",
    "SymbolTokenizer",
    "Tokenizer",
    "cmudict",
    "encode_prompt",
    "load_dataset",
    "pad_pairs",
    "read_conversations",
    "tokenize",
]
