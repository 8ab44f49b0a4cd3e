"""``jsonl``: questions of the user's own about texts of the user's own, from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...io.json_lines import check_keys, json_lines, name_of, text_of
from ..own import OwnTask, OwnText

KEYS = ("context", "question", "answers", "id")


@dataclass(frozen=True)
class Jsonl(OwnTask):
    """The lines of a file of JSON objects: ``context``, ``question``, ``answers`` (a text, or a list), maybe ``id``.

    Attributes:
        file: its path; read, and refused where a line is wrong, as soon as the task is named.
    """

    file: str = field(kw_only=True)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> list[OwnText]:
        lines = json_lines(Path(self.file).expanduser(), "file")
        return [_text(where, line, number) for number, (where, line) in enumerate(lines, 1)]


def _text(where: str, line: Mapping[str, Any], number: int) -> OwnText:
    check_keys(where, line, KEYS)
    context, question = (text_of(where, line, key) for key in ("context", "question"))
    return OwnText(name_of(where, line, number), context, question, _answers(where, line))


def _answers(where: str, line: Mapping[str, Any]) -> tuple[str, ...]:
    given = line.get("answers")
    if not isinstance(given, list):
        return (text_of(where, line, "answers"),)
    if not given:
        raise ConfigError(f"{where}: answers: the list is empty, expected at least one text.")
    named = {f"answers[{i}]": one for i, one in enumerate(given)}
    return tuple(text_of(where, named, key) for key in named)
