"""Config files: strict YAML, the shipped configs, and how one config is laid over another."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from . import strict_yaml
from .words import check_mapping, check_word

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

SUFFIX = ".yaml"
WORD_KEYS = ("store", "pattern", "select", "table", "score", "after")
BUDGET_KEYS = ("tokens", "share")
MAP_KEYS = ("scores", "roles")
SHARE_KEYS = ("retrieval_fraction", "kv_budget")


def parse(text: str, where: str) -> dict[str, Any]:
    """The mapping a YAML text holds.

    Raises:
        ConfigError: as ``strict_yaml.read``, or no mapping at the top.
    """
    return check_mapping(strict_yaml.read(text, where), where)


def read_file(path: str | os.PathLike, where: str = "") -> dict[str, Any]:
    """The mapping of a config file, laid over the shipped config that its ``extends`` names.

    Args:
        where: what an error starts with; the path without it.

    Raises:
        ConfigError: no such file, not YAML, or ``extends`` names no shipped config.
    """
    where = where or str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(strict_yaml.LARGEST_TEXT + 1)
        strict_yaml.check_size(len(data), where)
        text = data.decode("utf-8")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a path with a NUL in it, or bytes that are no text, are ValueErrors
        shown = where if where.isprintable() else repr(where)
        raise ConfigError(f"{shown}: cannot be read: {error}") from None
    given = parse(text, where)
    if "extends" not in given:
        return given
    base = read_shipped(given.pop("extends"), f"{where}: extends")
    return merge(base, given)


def shipped_folder() -> Traversable:
    """Where the shipped configs are."""
    return resources.files("hf_longctx.configs")


def shipped() -> tuple[str, ...]:
    """Names of the shipped configs, sorted."""
    files = (entry.name for entry in shipped_folder().iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)))


def check_shipped(name: object, where: str) -> None:
    """Raise ConfigError unless ``name`` is that of a shipped config."""
    check_word(name, shipped(), where, command="hf-longctx configs")


def read_shipped(name: object, where: str = "config") -> dict[str, Any]:
    """The mapping of a shipped config.

    Raises:
        ConfigError: no shipped config has that name (a path is never looked up).
    """
    return parse(shipped_text(name, where), f"{name}{SUFFIX}")


def shipped_text(name: object, where: str = "config") -> str:
    """The YAML text of a shipped config; ConfigError as ``read_shipped``."""
    check_shipped(name, where)
    return (shipped_folder() / f"{name}{SUFFIX}").read_text("utf-8")


def shipped_model(name: str) -> dict[str, Any]:
    """The ``model`` section of a shipped config, read without the (much longer) rest where the layout allows it."""
    text = shipped_text(name)
    block = re.search(r"^model:[ \t]*(?:#.*)?\n(?:[ \t].*\n|#.*\n|\n)+", text, re.MULTILINE)
    return parse(block.group() if block else text, f"{name}{SUFFIX}").get("model") or {}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``base``: mappings merge, everything else replaces.

    What an override makes meaningless goes: the fields of another store, pattern, select word, table, score or after
    word; of {scores, roles}, {retrieval_fraction, kv_budget} and an eviction's {tokens, share} the rival. New scores or
    roles also drop what was said about the old ones (source, measured, confidence, use), new roles the shares and
    dense_layers, which only choose among scores.
    """
    merged = _merge(base, over, ())
    _drop_shares_over_roles(merged, over)
    return merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    kept = dict(base)
    for key in _replaced(base, over, path):
        kept.pop(key, None)
    for key, value in over.items():
        old = kept.get(key)
        both = isinstance(value, Mapping) and isinstance(old, Mapping)
        kept[key] = _merge(old, value, (*path, key)) if both else copy.deepcopy(value)
    return kept


def _replaced(base: Mapping[str, Any], over: Mapping[str, Any], path: tuple[str, ...]) -> set[str]:
    """Keys of ``base`` that ``over`` makes meaningless."""
    if len(path) > 1 and path[0] in ("stores", "prefill", "decode") and path[1] in ("retrieval", "streaming"):
        if path[2:] == ("budget",):
            return {*BUDGET_KEYS} if any(over.get(key) is not None for key in BUDGET_KEYS) else set()
        new_word = any(isinstance(over.get(key), str) and over[key] != base.get(key) for key in WORD_KEYS)
        return set(base) if new_word else set()
    if path != ("heads",) and not (path[:2] == ("heads", "alternatives") and len(path) == 3):
        return set()
    gone: set[str] = set()
    if any(over.get(key) is not None for key in MAP_KEYS):
        gone |= {*MAP_KEYS, "source", "measured", "confidence", "use"}
    if over.get("roles") is not None:
        gone |= {*SHARE_KEYS, "kv_budget_tokens", "dense_layers"}
    if any(over.get(key) is not None for key in SHARE_KEYS):
        gone |= set(SHARE_KEYS)
    return gone


def _drop_shares_over_roles(merged: dict[str, Any], over: Mapping[str, Any]) -> None:
    """An override that switches to an alternative with roles gives roles, so the old share has nothing to choose."""
    given = over.get("heads")
    heads = merged.get("heads")
    if not isinstance(given, Mapping) or not isinstance(given.get("use"), str):
        return
    alternatives = heads.get("alternatives")
    used = alternatives.get(given["use"]) if isinstance(alternatives, Mapping) else None
    if isinstance(used, Mapping) and used.get("roles") is not None:
        for key in {*SHARE_KEYS, "dense_layers"} - set(given):
            heads.pop(key, None)
