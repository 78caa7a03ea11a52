"""Words and their phonemes as arrays, for headline_g2p.py.

A row is a prompt of fixed length, letters to its right and then a separator,
and a response, phonemes to its left and then an end: no model needs to know
where either begins.
"""

from typing import NamedTuple

import numpy as np

import keras_iris

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, END, SEPARATOR = 0, 1, 2
SYMBOLS = ["", "end", "=>", *LETTERS]
MAX_LETTERS, MAX_PHONEMES = 8, 8
PROMPT = MAX_LETTERS + 1  # tokens, with the separator
RESPONSE = MAX_PHONEMES + 1  # with the end


class Replication(NamedTuple):
    """The words of one seed, in common with no other; rows of token ids.

    Attributes:
        pool: The words that might be annotated, `(words, PROMPT + RESPONSE)`.
        validation: To choose rates by.
        test: For nothing but the scores in the tables.
    """

    pool: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_words():
    """Words of 3 to 8 letters and their phonemes, without stress."""
    words = []
    for word, phonemes in keras_iris.data.cmudict():
        is_plain = set(word) <= set(LETTERS) and 3 <= len(word) <= MAX_LETTERS
        if is_plain and len(phonemes) <= MAX_PHONEMES:
            words.append((word, [p.rstrip("012") for p in phonemes]))
    return words


def encode(words):
    """Rows of token ids, and the number of symbols."""
    phonemes = sorted({p for _, each in words for p in each})
    ids = {symbol: i for i, symbol in enumerate([*SYMBOLS, *phonemes])}
    rows = np.full((len(words), PROMPT + RESPONSE), PAD, "int32")
    for row, (word, response) in zip(rows, words, strict=True):
        row[PROMPT - 1 - len(word) : PROMPT] = [
            *(ids[letter] for letter in word),
            SEPARATOR,
        ]
        row[PROMPT : PROMPT + len(response) + 1] = [
            *(ids[phoneme] for phoneme in response),
            END,
        ]
    return rows, len(ids)


def split(rows, sizes, num_seeds):
    """A `Replication` for each seed, from disjoint words.

    Args:
        rows: What `encode` gives.
        sizes: Numbers of words: "pool", "validation" and "test".
        num_seeds: How many.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    size = sizes["pool"] + sizes["validation"] + sizes["test"]
    ends = np.cumsum([sizes["pool"], sizes["validation"]])
    return [
        Replication(*np.split(rows[order[i * size : (i + 1) * size]], ends))
        for i in range(num_seeds)
    ]


def corrupt(rows, share, seed):
    """Rows in which a share of the phonemes is replaced by random ones."""
    generator = np.random.default_rng(seed)
    first = len(SYMBOLS)
    is_wrong = (rows >= first) & (generator.random(rows.shape) < share)
    return np.where(
        is_wrong,
        generator.integers(first, rows.max() + 1, rows.shape, "int32"),
        rows,
    )


def edit_distances(left, right):
    """Edit distances of responses, the end being one more phoneme.

    Args:
        left: Token ids of shape `(words, RESPONSE)`, filled with `PAD`.
        right: The same.
    """
    lengths = [(each != PAD).sum(axis=1) for each in (left, right)]
    words, size = left.shape
    costs = np.zeros((size + 1, size + 1, words), "int64")
    costs[:, 0] = costs[0, :] = np.arange(size + 1)[:, None]
    for i in range(size):
        for j in range(size):
            costs[i + 1, j + 1] = np.minimum(
                np.minimum(costs[i, j + 1], costs[i + 1, j]) + 1,
                costs[i, j] + (left[:, i] != right[:, j]),
            )
    return costs[lengths[0], lengths[1], np.arange(words)]
