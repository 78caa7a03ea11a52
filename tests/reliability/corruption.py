"""Damage to files, by seed, and what may come of reading them."""

import copy
import json
import math
import os
import sys
import warnings
from contextlib import contextmanager

import numpy as np

DEEP = 100_000  # levels of nesting, far beyond Python's stack
_NUMBERS = (
    *(b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"1e308", b"0.5"),
    *(b"9" * 30, b"9" * 5000, b"99999999"),
)
_VALUES = (
    *(None, True, False, -1, 0, 1, 0.5, 1e308, 10**9, 10**30, -(10**400)),
    *(math.nan, math.inf, "", "x", "\ud800", "../x", "\0", "9" * 30),
    *([], {}, [[]], [None], {"a": 1}, {"role": 1, "content": None}),
)


def damage_bytes(content, rng):
    """Flips, cuts, doubles, inserts; numbers become others; deep nesting."""
    content = bytearray(content)
    start, end = sorted(rng.integers(0, len(content) + 1, 2))
    end = min(end, start + 1000)
    kind = rng.integers(8)
    if kind == 0:
        for place in rng.integers(0, len(content), rng.integers(1, 9)):
            content[place] ^= 1 << rng.integers(8)
    elif kind == 1:
        del content[start:]
    elif kind == 2:
        del content[start:end]
    elif kind == 3:
        content[start:start] = content[start:end]
    elif kind == 4:
        content[start:start] = rng.bytes(rng.integers(1, 20))
    elif kind == 5:
        content[start:end] = bytes(end - start)
    elif kind == 6:
        digits = [i for i, c in enumerate(content[:4000]) if chr(c).isdigit()]
        place = int(rng.choice(digits)) if digits else int(start)
        number = _NUMBERS[rng.integers(len(_NUMBERS))]
        content[place : place + 1] = number
    else:
        bracket = [b"[", b'{"a":', b'"', b"{{", b"("][rng.integers(5)]
        content[start:start] = bracket * [1, 50, DEEP][rng.integers(3)]
    return bytes(content)


def damage_json(content, rng):
    """One to three values of other types, or gone, doubled or renamed."""
    value = json.loads(content)
    for _ in range(rng.integers(1, 4)):
        value = _damage_value(value, rng)
    return json.dumps(value).encode()


def _damage_value(value, rng):
    root = [copy.deepcopy(value)]
    holder, key = root, 0
    while isinstance(holder[key], dict | list) and holder[key]:
        if rng.random() < 0.15:
            break
        holder = holder[key]
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = keys[rng.integers(len(keys))]
    kind = rng.integers(6)
    if kind == 0 and holder is not root:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list) and holder is not root:
        holder.insert(key, holder[key])
    elif kind == 3:
        holder[key] = [holder[key]]
    else:
        holder[key] = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
    return root[0]


def damage_lines(content, rng):
    """A line as JSON, or the bytes."""
    lines = content.splitlines(keepends=True)
    place = rng.integers(len(lines))
    lines[place] = damage_json(lines[place], rng) + b"\n"
    return b"".join(lines)


def damage_header(content, rng):
    """The JSON before the arrays of a safetensors file; its length is right."""
    size = int.from_bytes(content[:8], "little")
    header = damage_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


class Watched:
    """Files that are opened for writing, renamed or removed, by an audit hook.

    An audit hook stays for the life of the process, so there is one.
    """

    def __init__(self):
        self.paths = None
        sys.addaudithook(self._see)

    def _see(self, event, arguments):
        if self.paths is None:
            return
        if event == "open":
            path, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            arguments = (path,)
        elif event not in (
            *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link"),
            *("os.symlink", "os.truncate", "os.chmod", "shutil.rmtree"),
        ):
            return
        for path in arguments[: 2 if "link" in event or "name" in event else 1]:
            if isinstance(path, str | bytes | os.PathLike):
                self.paths.append(os.path.realpath(os.fsdecode(path)))

    @contextmanager
    def outside(self, folder):
        """Gives the list of the paths touched that aren't in a folder."""
        self.paths, found = [], []
        try:
            yield found
        finally:
            inside = os.path.realpath(folder) + os.sep
            found += [
                path
                for path in self.paths
                if not f"{path}{os.sep}".startswith(inside)
                and path != os.devnull
                and "__pycache__" not in path
            ]
            self.paths = None


WATCHED = Watched()


def try_damages(file, read, damages, seeds, allowed=()):
    """Reads a file so many times, each time damaged in another way.

    Args:
        file: The file, whole.
        read: Reads it.
        damages: Functions of (content, rng).
        seeds: The seed of each, two numbers.
        allowed: Texts, one of which an error's message has beside the file's
            name.

    Returns:
        How many were refused.
    """
    whole, refused = file.read_bytes(), 0
    for i, seed in enumerate(seeds):
        damage = damages[i % len(damages)]
        damaged = damage(whole, np.random.default_rng(seed))
        file.write_bytes(damaged)
        where = f"seed {seed}, {damage.__name__}: {damaged[:300]!r}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                read()
            except ValueError as error:
                refused += 1
                _check_message(error, (file.name, *allowed), where)
            except BaseException as error:
                error.add_note(where)
                raise
    file.write_bytes(whole)
    return refused


def _check_message(error, names, where):
    """Says which file it is, and isn't one that nobody thought of."""
    text = str(error)
    if type(error) is not ValueError or not any(n in text for n in names):
        error.add_note(f"Not an error of keras_iris' own. {where}")
        raise error
    assert len(text) < 2000, (text[:3000], where)
