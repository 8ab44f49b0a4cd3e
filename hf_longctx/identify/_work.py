"""What a long run saves on its way: a file in the work folder that other settings are kept from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..patch import unwrap
from ..weights import plain_parts


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


def model_hash(model: nn.Module) -> str:
    """Of the names and shapes of all weights and the first values of each: reading all of them would take minutes."""
    told = hashlib.sha256()
    for name, weight in unwrap(model).named_parameters():
        told.update(f"{name}{tuple(weight.shape)}".encode())
        for _, part in () if weight.is_meta else plain_parts(name, weight):
            told.update(part.flatten()[:8].float().cpu().numpy().tobytes())
    return told.hexdigest()[:16]
