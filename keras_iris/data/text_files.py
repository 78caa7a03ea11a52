"""Small text files of a checkpoint's folder."""

from pathlib import Path
from typing import Any

from keras_iris.files import parse_json


def read_text(file: Path) -> str:
    """The content of a text file.

    Raises:
        ValueError: If it isn't UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text in UTF-8 ({error}). Download it again, or "
            "save it in that encoding."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, `{}` if there is no such file.

    Raises:
        ValueError: If it isn't a JSON object in UTF-8.
    """
    if not file.is_file():
        return {}
    text = read_text(file)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}). Download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a {type(content).__name__}, expected a JSON "
            "object. Download it again."
        )
    return content
