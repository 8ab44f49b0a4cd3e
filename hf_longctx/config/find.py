"""Which config a model gets."""

from __future__ import annotations

import difflib
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import hub
from .checks import LONGEST, short, wrong
from .config import LongCtxConfig, load_shipped
from .files import check_shipped, shipped, shipped_model
from .model import ModelSection, text_config
from .paths import refuse_paths
from .words import make

log = logging.getLogger(__name__)

YAML = (".yaml", ".yml")  # what the name of a config file ends in
# candidates that the error of "auto" names, and numbers of their fingerprint that may differ
LISTED = 3
FEW = 2


def resolve(
    config: str | os.PathLike | Mapping[str, Any] | LongCtxConfig,
    hf_config: Any,
    name_or_path: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LongCtxConfig:
    """The config to patch a model with, checked against the model.

    Args:
        config: ``"auto"`` (nothing is fetched; where no one config fits, overrides with a ``retrieval_fraction`` of 1.0
            need none), what ``load_named`` takes, the path of a YAML, plain data, or a config.
        hf_config: the model's Transformers config.
        name_or_path: what the model was loaded from; without it, ``hf_config._name_or_path``.
        overrides: sections laid over the config before it is checked.

    Raises:
        ConfigError: no such config, a wrong one, or one made for another model.
    """
    if isinstance(config, LongCtxConfig):
        found = LongCtxConfig.from_dict(config.to_dict())  # dataclasses.replace checks no bounds
    elif isinstance(config, Mapping):
        found = LongCtxConfig.from_dict(config)
    elif isinstance(config, os.PathLike):
        found = LongCtxConfig.from_yaml(config)
    elif not isinstance(config, str):
        raise wrong(
            "config",
            config,
            "'auto', a shipped name, a path to a .yaml file, a Hub repository, a mapping or a LongCtxConfig",
        )
    elif config == "auto":
        found = _auto(hf_config, name_or_path or getattr(hf_config, "_name_or_path", None) or "", overrides)
    else:
        found = load_named(config)
    if overrides:
        found = found.override(**overrides)
    found.check_model(hf_config)
    return found


def load_named(name: str, where: str = "config") -> LongCtxConfig:
    """The config that a text names: a path that ends in .yaml or .yml, a shipped one, or a repository of the Hub.

    A shipped config goes by its name or a hub id that it lists, and nothing is fetched then. Any other
    ``user/repo`` or ``user/repo@revision`` is asked for its ``longctx.yaml`` (``hub.load``).

    Raises:
        ConfigError: there is none, or it is wrong.
    """
    if is_file_name(name):
        return LongCtxConfig.from_yaml(name)
    known = find_name(name)
    wanted = hub.repository(name)
    if known is None and wanted is not None and not os.path.exists(name):
        return hub.load(wanted, where, _nearest(name))
    return load_shipped(known or shipped_name(name, where))


def is_file_name(name: str) -> bool:
    """Whether a text is the path of a config file."""
    return name.lower().endswith(YAML)


def find_name(name: str) -> str | None:
    """The shipped config that has this name or lists this hub id, both in any case; None where there is none.

    Raises:
        ConfigError: several configs list the id.
    """
    asked = name.lower()
    found = [one for one in shipped() if one == name] or [one for one in shipped() if one.lower() == asked]
    if not found and "/" in name:
        found = [one for one, model in _models().items() if asked in (known.lower() for known in model.ids)]
    if len(found) > 1:
        raise ConfigError(f"{len(found)} shipped configs go by {short(name)}: {', '.join(found)}. Name one of them.")
    return found[0] if found else None


def shipped_name(name: str, where: str = "config") -> str:
    """As ``find_name``, but ConfigError where there is none; it names the nearest."""
    found = find_name(name)
    if found is not None:
        return found
    if os.path.isdir(name):
        raise ConfigError(
            f"{where}: {short(name)} is a folder, expected a shipped name, a hub id or a .yaml file. 'auto' takes the "
            "config of a model that was loaded from a folder."
        )
    if "/" not in name:
        check_shipped(name, where)
    raise ConfigError(
        f"{where}: got {short(name)}, but no shipped config has this name or lists this id; `hf-longctx configs` lists "
        f"the shipped ones, `hf-longctx identify` makes one.{_nearest(name)}"
    )


def _nearest(name: str) -> str:
    """`` Did you mean ...?`` with the id of a shipped config, or nothing."""
    ids = {known.lower(): known for model in _models().values() for known in model.ids}
    match = difflib.get_close_matches(name.lower(), ids, 1, 0.5) if len(name) <= LONGEST else []
    return f" Did you mean {ids[match[0]]!r}?" if match else ""


def _models() -> dict[str, ModelSection]:
    """The model section of every shipped config."""
    return {name: make(ModelSection, shipped_model(name), f"{name}: model") for name in shipped()}


def _auto(hf_config: Any, name_or_path: str, overrides: Mapping[str, Any] | None) -> LongCtxConfig:
    own = getattr(text_config(hf_config), "longctx", None)
    if own is not None and own is not False:
        try:
            found = LongCtxConfig.from_dict(own)
        except ConfigError as error:
            raise ConfigError(f"config.longctx of the model: {error}") from None
        refuse_paths(found, "config.longctx of the model", "comes with a model")
        return found
    models = _models()
    by_id = [name for name, model in models.items() if _names(name_or_path, model.ids)]
    if len(by_id) == 1:
        log.info("config %s: the model's name %r is one of its ids", by_id[0], name_or_path)
        return load_shipped(by_id[0])
    wrongs = {name: _mismatches(model, hf_config) for name, model in models.items()}
    fits = [name for name in by_id or models if not wrongs[name]]
    fits = [name for name in fits if models[name].rope_note(hf_config) is None] or fits
    if len(fits) == 1:
        log.info("config %s: its model_type, head dimensions and fingerprint agree with the model", fits[0])
        return load_shipped(fits[0])
    heads = (overrides or {}).get("heads")
    if isinstance(heads, Mapping) and heads.get("retrieval_fraction") == 1:
        log.info("no config of the model %r, and none is needed: every head is a retrieval head", name_or_path)
        return _without_map(hf_config)
    raise ConfigError(_nothing_found(name_or_path, wrongs, fits))


def _without_map(hf_config: Any) -> LongCtxConfig:
    """A config in which every head is a retrieval head."""
    model = LongCtxConfig.describe(hf_config)
    roles = ["R" * model["num_key_value_heads"]] * model["num_hidden_layers"]
    return LongCtxConfig.from_dict({"model": model, "heads": {"roles": roles}})


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


def _nothing_found(name_or_path: str, wrongs: Mapping[str, list[str]], fits: list[str]) -> str:
    named = shlex.quote(name_or_path or "MODEL")
    measure = f'Measure its heads: hf-longctx identify {named} --out my.yaml, then patch_model(model, "my.yaml").'
    if fits:
        said = f"{len(fits)} shipped configs fit the model {name_or_path!r}: {', '.join(fits)}."
        return f"config='auto': {said} Name one of them: patch_model(model, {fits[0]!r}). {measure}"
    lines = [f"config='auto': no shipped config fits the model {name_or_path!r}. {measure}"]
    near = {name: wrong for name, wrong in wrongs.items() if all(one.startswith("fingerprint.") for one in wrong)}
    nearest = sorted((len(wrong), name) for name, wrong in near.items() if len(wrong) <= FEW)
    if nearest:
        lines.append(
            "Configs of nearly this model, and what disagrees (docs/troubleshooting.md says when one will do):"
        )
        lines += [f"  {name}: {'; '.join(wrongs[name])}" for _, name in nearest[:LISTED]]
        lines += [f"  and {len(nearest) - LISTED} more"] if len(nearest) > LISTED else []
    return "\n".join(lines)
