"""JSON lines that a user wrote: one object a line, and an error that names the line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config.checks import near
from ..errors import ConfigError


def json_lines(path: str | Path, option: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, object) of every line that is not empty; ``where`` names ``option``, the file and the line's number.

    Raises:
        ConfigError: the file cannot be read, has no line, or a line is no JSON object.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{option}: {path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: no JSON: {error}. Every line is an object by itself.") from None
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: got a {type(value).__name__}, expected an object: {{...}}.")
        found.append((where, value))
    if not found:
        raise ConfigError(f"{option}: {path} is empty.")
    return found


def check_keys(where: str, line: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse a key that nobody reads: it may be one that is misspelt.

    Raises:
        ConfigError: there is such a key.
    """
    for key in line:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known: {', '.join(known)}.{near(key, known)}")


def name_of(where: str, line: Mapping[str, Any], number: int) -> str:
    """What a line is called: its ``id``, or else its number.

    Raises:
        ConfigError: the id is neither a text nor a whole number.
    """
    name = line.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ConfigError(f"{where}: id: got {type(name).__name__}, expected a text or a whole number.")
    return str(name)


def text_of(where: str, line: Mapping[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises:
        ConfigError: there is none, or it is empty.
    """
    value = line.get(key)
    if not isinstance(value, str) or not value.strip():
        given = "nothing" if key not in line else "an empty text" if isinstance(value, str) else type(value).__name__
        raise ConfigError(f"{where}: {key}: got {given}, expected a text.")
    return value
