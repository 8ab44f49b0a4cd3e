"""The keywords of ``patch_model`` and ``patched``: sections laid over a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from ..config.config import LongCtxConfig
from ..config.words import near
from ..errors import ConfigError


def keywords(caller: str, model: nn.Module | None, given: Mapping[str, Any], others: dict[str, Any]) -> tuple:
    """(the model, the sections that were given). ``model`` alone may be either: a module, or the section of a config.

    Args:
        model: as given by position.
        given: keyword -> section, None where it was not given.
        others: what else was given by keyword.

    Raises:
        ConfigError: an unknown keyword; the message has the known ones.
    """
    known = [field.name for field in fields(LongCtxConfig)]
    if model is None and isinstance(others.get("model"), nn.Module):
        model = others.pop("model")
    for name in others:
        if name not in known:
            raise ConfigError(
                f"{caller}: {name!r} is no keyword of it; known: config, {', '.join(known)}.{near(name, known)}"
            )
    return model, {name: section for name, section in {**others, **given}.items() if section is not None}
