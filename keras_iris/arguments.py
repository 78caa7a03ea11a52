"""Checks of arguments that many functions take."""

import numbers
from typing import Any


def check_positive(name: str, value: Any) -> float:
    """Returns `value` if it is a positive finite number.

    Raises:
        ValueError: It isn't.
    """
    is_number = isinstance(value, numbers.Real)
    if not (is_number and 0 < value < float("inf")):
        raise ValueError(
            f"`{name}` has to be a positive finite number. Received: {value!r}"
        )
    return float(value)


def check_count(name: str, value: Any, at_least: int = 1) -> int:
    """Returns `value` if it is an integer of at least `at_least`.

    Raises:
        ValueError: It isn't.
    """
    is_integer = isinstance(value, numbers.Integral)
    if not is_integer or isinstance(value, bool) or value < at_least:
        raise ValueError(
            f"`{name}` has to be an integer of at least {at_least}. Received: "
            f"{value!r}"
        )
    return int(value)


def check_shared(name: str, value: int, count: int) -> int:
    """Returns `value` if as many rows can be shared by devices or processes.

    Args:
        name: What the value is, such as "batch_size".
        value: A number of rows.
        count: The number of devices or processes.

    Raises:
        ValueError: `count` doesn't divide it.
    """
    if value % count:
        raise ValueError(
            f"{count} devices or processes share every batch and have to "
            f"divide {name}. Received: {value}. Choose a multiple of {count}."
        )
    return value


def check_between(name: str, value: Any, low: float, high: float) -> float:
    """Returns `value` if it is a number in `[low, high]`.

    Raises:
        ValueError: It isn't.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number and low <= value <= high):
        raise ValueError(
            f"`{name}` has to be a number in [{low}, {high}]. Received: "
            f"{value!r}"
        )
    return float(value)
