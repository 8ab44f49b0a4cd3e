"""The file of a long run that can be resumed, and the settings that must be the same then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def work_file(work: Path | None, name: str) -> Path | None:
    """Where the state is saved; the folder is made at once, because the first state may be hours away.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if work is None:
        return None
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"work: {work} cannot be made: {error}") from None
    return work / name


def check_settings(path: Path, told: Mapping[str, Any], settings: Mapping[str, Any], option: str = "work") -> None:
    """Raise ConfigError unless the settings ``told`` in a file are those of this run; ``option`` named its folder."""
    wanted = json.loads(json.dumps(settings))
    differ = sorted(name for name in {*told, *wanted} if told.get(name) != wanted.get(name))
    if differ:
        was = ", ".join(f"{name} (was {told.get(name)!r}, is {wanted.get(name)!r})" for name in differ)
        raise ConfigError(
            f"{option}: {path} is of a run with other settings: {was}. Remove it, or give another folder."
        )
