"""Names to data: Hugging Face datasets, local files, embedded data."""

import importlib.resources
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from keras_iris.data.conversations import Conversation, read_conversations

SHUFFLE_BUFFER = 10_000  # rows, of a streamed dataset


def load_dataset(
    name: str | Path,
    *,
    split: str = "train",
    num_prompts: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> list[Conversation]:
    """Loads conversations from the Hugging Face hub or from local files.

    Args:
        name: A dataset's id, such as `"HuggingFaceH4/ultrachat_200k"`, a
            folder of JSONL or Parquet files, or one such file.
        split: The split, such as `"train_sft"`. One file has no splits.
        num_prompts: Draw at most so many rows, without repetition. Defaults
            to all rows, in their order.
        seed: Of the drawing.
        streaming: Read only as much of the dataset as is needed; rows are
            then drawn from a moving buffer.

    Returns:
        The conversations.

    Raises:
        ValueError: If `num_prompts` < 1 or `read_conversations` cannot read a
            row.
    """
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(
            f"Expected `num_prompts` of at least 1, received {num_prompts}. "
            "Pass None for all rows."
        )
    if Path(name).suffix in (".jsonl", ".parquet"):
        return _draw(read_conversations(name), num_prompts, seed)
    import datasets

    rows = datasets.load_dataset(str(name), split=split, streaming=streaming)
    if num_prompts is None:
        return read_conversations(rows)
    if streaming:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        return read_conversations(rows.take(num_prompts))
    return read_conversations(
        rows.select(_draw(np.arange(len(rows)), num_prompts, seed))
    )


def cmudict() -> list[tuple[str, tuple[str, ...]]]:
    """The Carnegie Mellon Pronouncing Dictionary, embedded in the package.

    126,052 English words with their first pronunciation; further ones, which
    the file writes as "word(2)", are left out, so that every word occurs once.
    Its licence is in `cmudict.LICENSE`, beside this module.

    Returns:
        (word, phonemes) for each word, phonemes in ARPAbet with stress digits.

    Example:
    >>> dict(cmudict())["self"]
    ('S', 'EH1', 'L', 'F')
    """
    file = importlib.resources.files(__package__) / "cmudict.dict.xz"
    text = lzma.decompress(file.read_bytes()).decode("utf-8")
    entries = []
    for line in text.splitlines():
        word, *phonemes = line.partition(" #")[0].split()  # drop a comment
        if not word.endswith(")"):
            entries.append((word, tuple(phonemes)))
    return entries


def _draw(rows: Any, number: int | None, seed: int) -> Any:
    if number is None:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:number]]
