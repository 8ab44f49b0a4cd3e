"""What every check of a config's values shares: plain data, and how an error says what was given and what fits."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from ..errors import ConfigError

DEEPEST = 16  # levels of a free mapping; a YAML alias can make one that never ends
LONGEST = 80  # characters of a word that a message repeats, or that is compared with the known ones
MANY = 30  # words that an error lists at most, where a command lists them too
MOST_ITEMS = 2**16  # of a list or mapping; with fewer layers and heads than that, rows are counted before they are read


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of more than 4300 digits.
        return super().repr_int(x, level) if x.bit_length() < 14000 else f"a number of {x.bit_length()} bits"


_short = _Short()
_short.maxstring = _short.maxother = LONGEST
short = _short.repr


def check_mapping(value: object, where: str) -> dict[str, Any]:
    """A copy of ``value`` if it is a mapping with text keys, or a ConfigError."""
    if not isinstance(value, Mapping):
        raise wrong(where or "config", value, "a mapping")
    check_count(value, where or "config")
    for key in value:
        if not isinstance(key, str):
            raise wrong(join(where, _short.repr(key)), key, "a key that is text")
    return dict(value)


def check_plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of ``value`` if JSON can hold it (text, finite numbers, lists, mappings), or a ConfigError."""
    if depth > DEEPEST:
        raise ConfigError(f"{where}: nested more than {DEEPEST} levels deep; expected plain data.")
    if isinstance(value, Mapping):
        items = check_mapping(value, where).items()
        return {key: check_plain(item, join(where, key), depth + 1) for key, item in items}
    if isinstance(value, (list, tuple)):
        check_count(value, where)
        return [check_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    if value is None or isinstance(value, str) or (isinstance(value, (int, float)) and is_finite(value)):
        return value
    raise wrong(where, value, "text, a finite number, a list or a mapping (put a date in quotes)")


def check_count(value: Sized, where: str) -> None:
    """Raise ConfigError for more items than any config has, before they are looked at."""
    if len(value) > MOST_ITEMS:
        raise ConfigError(f"{where}: got {len(value)} entries, expected at most {MOST_ITEMS}.")


def check_word(value: object, known: Iterable[str], where: str, hint: str = "", command: str = "") -> None:
    """Raise ConfigError unless ``value`` is one of the ``known`` words.

    ``hint`` ends the message; it names the ``command`` that lists the words, where there are more than ``MANY``.
    """
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        fits = f"one of: {', '.join(known) or 'none'}"
        if command and len(known) > MANY:
            fits = f"one of {len(known)} names, which `{command}` lists"
        raise wrong(where, value, fits, near(value, known) + hint)


def join(where: str, name: str) -> str:
    """The full path of a field, as a message says it."""
    name = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return f"{where}.{name}" if where else name


def near(given: object, known: Iterable[str]) -> str:
    """`` Did you mean ...?`` or nothing."""
    comparable = isinstance(given, str) and len(given) <= LONGEST
    match = difflib.get_close_matches(given.lower(), list(known), 1, 0.5) if comparable else []
    return f" Did you mean {match[0]!r}?" if match else ""


def wrong(where: str, given: object, fits: str, hint: str = "") -> ConfigError:
    """The error for a value that does not fit, to be raised by the caller."""
    return ConfigError(f"{where}: got {_short.repr(given)}, expected {fits}.{hint}")


def is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
