"""Which config a model gets."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import LongCtxConfig, load_shipped
from .config_files import shipped, shipped_model
from .config_sections import ModelSection
from .errors import ConfigError
from .registry import make, wrong

log = logging.getLogger(__name__)

LISTED = 8  # candidates that the error of "auto" names


def resolve(
    config: str | os.PathLike | Mapping[str, Any] | LongCtxConfig, hf_config: Any, name_or_path: str | None = None
) -> LongCtxConfig:
    """The config to patch a model with, checked against the model.

    Args:
        config: ``"auto"``, the name of a shipped config, a path that ends in .yaml or .yml, plain data, or a config.
        hf_config: the model's Transformers config.
        name_or_path: what the model was loaded from; without it, ``hf_config._name_or_path``.

    Raises:
        ConfigError: no such config, a wrong one, or one made for another model.
    """
    if isinstance(config, LongCtxConfig):
        found = LongCtxConfig.from_dict(config.to_dict())  # dataclasses.replace checks no bounds
    elif isinstance(config, Mapping):
        found = LongCtxConfig.from_dict(config)
    elif isinstance(config, os.PathLike) or (isinstance(config, str) and config.lower().endswith((".yaml", ".yml"))):
        found = LongCtxConfig.from_yaml(config)
    elif not isinstance(config, str):
        raise wrong("config", config, "'auto', a shipped name, a path to a .yaml file, a mapping or a LongCtxConfig")
    elif config == "auto":
        found = _auto(hf_config, name_or_path or getattr(hf_config, "_name_or_path", None) or "")
    else:
        found = load_shipped(config)
    found.check_model(hf_config)
    return found


def _auto(hf_config: Any, name_or_path: str) -> LongCtxConfig:
    own = getattr(hf_config, "longctx", None)
    if own is not None and own is not False:
        try:
            found = LongCtxConfig.from_dict(own)
        except ConfigError as error:
            raise ConfigError(f"config.longctx of the model: {error}") from None
        _refuse_paths(found)
        return found
    models = {name: make(ModelSection, shipped_model(name), f"{name}: model") for name in shipped()}
    by_id = [name for name, model in models.items() if _names(name_or_path, model.ids)]
    if len(by_id) == 1:
        log.info("config %s: the model's name %r is one of its ids", by_id[0], name_or_path)
        return load_shipped(by_id[0])
    wrongs = {name: _mismatches(model, hf_config) for name, model in models.items()}
    fits = [name for name in by_id or models if not wrongs[name]]
    if len(fits) == 1:
        log.info("config %s: its model_type, head dimensions and fingerprint agree with the model", fits[0])
        return load_shipped(fits[0])
    raise ConfigError(_nothing_found(name_or_path, wrongs, fits))


def _names(name_or_path: str, ids: Iterable[str]) -> bool:
    """Whether a name is one of ``ids``: a hub name as a whole, a folder by its last part, both case-insensitive."""
    name, is_folder = checkpoint_name(name_or_path)
    known = {one.lower() for one in ids}
    return name.lower() in ({one.rpartition("/")[2] for one in known} if is_folder else known)


def checkpoint_name(name_or_path: str) -> tuple[str, bool]:
    """(hub id, False), also of a folder in the hub's cache, or (last part of another folder's path, True)."""
    path = name_or_path.replace("\\", "/").rstrip("/")
    hub_cache = re.search(r"(?:^|/)models--(.+?)--(.+?)/snapshots/[^/]+$", path)
    if hub_cache:
        return "/".join(hub_cache.groups()), False
    if path.count("/") == 1 and not path.startswith((".", "~")) and not os.path.isdir(name_or_path):
        return path, False
    last = path.rpartition("/")[2]
    return Path(path).expanduser().resolve().name if last in (".", "..", "~") else last, True


def _mismatches(model: ModelSection, hf_config: Any) -> list[str]:
    missing = [field.name for field in fields(model.fingerprint) if getattr(model.fingerprint, field.name) is None]
    return model.mismatches(hf_config) + [f"fingerprint.{name} is missing in the config" for name in missing]


def _refuse_paths(found: LongCtxConfig) -> None:
    """What came with a model may be anybody's, so it names no place to write to."""
    for role, spec in (("retrieval", found.stores.retrieval), ("streaming", found.stores.streaming)):
        for field in fields(spec):
            if field.metadata.get("path") and (given := getattr(spec, field.name)) is not None:
                raise ConfigError(
                    f"config.longctx of the model: stores.{role}.{field.name} is {given!r}, and a config that comes "
                    "with a model may name no path. Give the config yourself: a .yaml or a dict with that path in it."
                )


def _nothing_found(name_or_path: str, wrongs: Mapping[str, list[str]], fits: list[str]) -> str:
    if fits:
        said = f"{len(fits)} shipped configs fit the model {name_or_path!r}: {', '.join(fits)}. Name one of them."
    else:
        nearest = sorted(wrongs, key=lambda name: (len(wrongs[name]), name))
        listed = "".join(f"\n  {name}: {'; '.join(wrongs[name])}" for name in nearest[:LISTED])
        more = f"\n  and {len(nearest) - LISTED} more" if len(nearest) > LISTED else ""
        listed = (listed or " none") + more
        said = f"no shipped config fits the model {name_or_path!r}. Candidates and what disagrees:{listed}"
    return (
        f"config='auto': {said}\n"
        "To make one: `hf-longctx identify` measures the head scores of a model and writes its config; or give your "
        "own: LongCtxConfig.from_dict({'model': LongCtxConfig.describe(model.config), 'heads': {'scores': ...}})."
    )
