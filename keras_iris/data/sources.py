"""Names to data: Hugging Face datasets, local files, embedded data."""

import importlib.resources
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np

from keras_iris.arguments import check_count
from keras_iris.data.conversations import Conversation, read_conversations
from keras_iris.data.rows import OnBadRow

SHUFFLE_BUFFER = 10_000  # rows, of a streamed dataset


def load_dataset(  # noqa: PLR0913
    name: str | Path,
    *,
    split: str = "train",
    num_prompts: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    on_bad_row: OnBadRow = "error",
) -> list[Conversation]:
    """Loads conversations from the Hugging Face hub or from local files.

    Args:
        name: A dataset's id, such as `"HuggingFaceH4/ultrachat_200k"`, a
            folder of JSONL or Parquet files, or one such file.
        split: The split, such as `"train_sft"`. One file has no splits; it
            is taken for one whose name starts with "train".
        num_prompts: Draw at most so many rows, without repetition. Defaults
            to all rows, in their order.
        seed: Of the drawing.
        streaming: Read only as much of the dataset as is needed; rows are
            then drawn from a moving buffer. One file is always read whole.
        on_bad_row: As in `read_conversations`.

    Returns:
        The conversations.

    Raises:
        ValueError: If `num_prompts` < 1, there is no such data, one file is
            asked for another split or to be streamed, or
            `read_conversations` cannot read a row.
    """
    if num_prompts is not None:
        check_count("num_prompts", num_prompts)
    if Path(name).suffix.lower() in (".jsonl", ".parquet"):
        _check_file_options(name, split, streaming)
        conversations = read_conversations(name, on_bad_row=on_bad_row)
        return _draw(conversations, num_prompts, seed)
    rows = _load_rows(name, split, streaming)
    if num_prompts is not None and streaming:
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        rows = rows.take(num_prompts)
    elif num_prompts is not None:
        rows = rows.select(_draw(np.arange(len(rows)), num_prompts, seed))
    return read_conversations(rows, on_bad_row=on_bad_row)


def cmudict() -> list[tuple[str, tuple[str, ...]]]:
    """The Carnegie Mellon Pronouncing Dictionary, embedded in the package.

    126,052 English words with their first pronunciation; further ones, which
    the file writes as "word(2)", are left out, so that every word occurs once.
    Its licence is in `cmudict.LICENSE`, beside this module.

    Returns:
        (word, phonemes) for each word, phonemes in ARPAbet with stress digits.

    Examples:
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


def _check_file_options(name: str | Path, split: str, streaming: bool) -> None:
    if streaming and Path(name).expanduser().exists():
        raise ValueError(
            f"`streaming=True` with one file, {name}, which is read whole. "
            "Leave it out, or pass the folder that holds the file."
        )
    if not re.fullmatch(r"train\w*", split):
        raise ValueError(
            f"One file, {name}, has no splits. Received: split={split!r}, "
            "expected 'train'. Pass the file of that split, or a folder with "
            "a file for each."
        )


def _load_rows(name: str | Path, split: str, streaming: bool) -> Any:
    import datasets

    path = Path(name).expanduser()
    is_path = isinstance(name, Path) or path.is_absolute() or name[:1] == "."
    if is_path and not path.exists():
        raise _no_dataset(name, "nothing is there.")
    place = str(path if is_path else name)
    try:
        return datasets.load_dataset(place, split=split, streaming=streaming)
    except FileNotFoundError as error:
        raise _no_dataset(name, str(error)) from error


def _no_dataset(name: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"There is no dataset {str(name)!r}: {reason} Expected a dataset's "
        "id, a folder of JSONL or Parquet files, or a .jsonl or .parquet "
        "file. Check the name."
    )


def _draw(rows: Any, number: int | None, seed: int) -> Any:
    if number is None:
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:number]]
