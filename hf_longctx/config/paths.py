"""What somebody else made names no place to write to."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import LongCtxConfig


def refuse_paths(found: LongCtxConfig, whose: str, which: str) -> None:
    """Raise ConfigError for a config that names a path; ``which`` says what for a config it is."""
    for role, spec in (("retrieval", found.stores.retrieval), ("streaming", found.stores.streaming)):
        for field in fields(spec):
            if field.metadata.get("path") and (given := getattr(spec, field.name)) is not None:
                raise ConfigError(
                    f"{whose}: stores.{role}.{field.name} is {given!r}, and a config that {which} may name no path. "
                    "Give the config yourself: a .yaml or a dict with that path in it."
                )
