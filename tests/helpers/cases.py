"""The small settings that every word brings itself (``cases`` of its class), for the tests that run over all words."""

from __future__ import annotations

from typing import Any

import pytest

from hf_longctx.config.words import load, words


def cases(folder: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (word, fields) of every case of every word of a folder; a name is as a task's: ``word:field=value``."""
    found = {}
    for word in words(folder):
        for fields in load(folder, word).cases:
            alone = len(load(folder, word).cases) == 1 and folder != "tasks.synthetic"
            said = [] if alone else [f"{key}={value}" for key, value in fields.items()]
            found[":".join([word, *said])] = (word, dict(fields))
    return found


def one_each(folder: str) -> list:
    """Parameters of a test: the names of all cases, the further ones of a word for the slow suite."""
    found = cases(folder)
    first = {word: name for name, (word, _) in reversed(found.items())}
    return [pytest.param(name, marks=[pytest.mark.slow] * (first[word] != name)) for name, (word, _) in found.items()]
