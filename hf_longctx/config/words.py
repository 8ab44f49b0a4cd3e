"""YAML word -> class, and mappings -> frozen dataclasses, checked field by field.

The file name is the word: ``store: sink_recent`` is the class ``SinkRecent`` in ``stores/sink_recent.py``. A word is
looked up in the folder's listing, and among those the running program registered, before anything is imported. So a
config can name nothing else.

Field metadata: ``min``, ``max`` (inclusive), ``above`` (exclusive), ``unit``, ``choices``; they hold for the numbers
inside lists as well. ``word`` makes a field that holds a spec; with ``bare`` the word alone will do for
one without fields.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from . import strict_yaml
from .bounds import LARGEST, MOST
from .checks import LONGEST, check_count, check_mapping, check_plain, check_word, is_finite, join, near, short, wrong

# Kind of word -> the folder whose files are its words. `register` adds to them.
FOLDERS = {
    "store": "stores",
    "prefill": "prefill",
    "decode": "decode",
    "eviction": "eviction",
    "after": "eviction.after",
    "heads": "identification.methods",
    "task": "tasks.synthetic",
    "kernel": "kernels",
    "family": "patches",
}
registered: dict[str, dict[str, Any]] = {folder: {} for folder in FOLDERS.values()}  # folder -> word -> class or object


def words(folder: str) -> tuple[str, ...]:
    """The words of ``hf_longctx/<folder>``, sorted: its files but ``base`` and underscore names, and those registered.

    Nothing of the folder is imported.
    """
    name = f"hf_longctx.{folder}"
    package = sys.modules.get(name)
    path = importlib.util.find_spec(name).submodule_search_locations if package is None else package.__path__
    return tuple(sorted({*_file_words(tuple(path)), *registered.get(folder, ())}))


@functools.cache
def _file_words(path: tuple[str, ...]) -> tuple[str, ...]:
    names = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return tuple(name for name in names if name != "base" and not name.startswith("_"))


def load(folder: str, word: object, where: str = "") -> type:
    """The class that ``word`` names in ``folder``.

    Raises:
        ConfigError: nothing has that word, or its file has no class of that name.
    """
    where = where or folder
    check_word(word, words(folder), where, register_first(folder, word))
    if word in registered[folder]:
        return registered[folder][word]
    name = class_name(word)
    found = getattr(importlib.import_module(f"hf_longctx.{folder}.{word}"), name, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ConfigError(f"{where}: {folder}/{word}.py defines no dataclass {name}, so it is not a word.")
    return found


def class_name(word: str) -> str:
    """The name of a word's class in the package: ``sink_recent`` is ``SinkRecent``."""
    return "".join(part.capitalize() for part in word.split("_"))


def register_first(folder: str, word: object) -> str:
    """What an error about an unknown word adds, for a word that is somebody's own."""
    kind = next(kind for kind, known in FOLDERS.items() if known == folder)
    if not isinstance(word, str) or not word.isidentifier() or len(word) > LONGEST:
        return ""
    return f" If it is your own, call hf_longctx.register({kind!r}, {word!r}, ...) first."


def build(folder: str, mapping: object, key: str, where: str, role: str | None = None) -> Any:
    """The spec a mapping like ``{"store": "sink_recent", "sink": 64}`` (``key="store"``) names.

    A spec instead of the mapping is checked as its fields would be.

    Args:
        where: full path of the mapping, e.g. ``"stores.streaming"``.
        role: refuse words that do not serve the heads of this role.

    Raises:
        ConfigError: unknown word, wrong role, or a field that does not fit.
    """
    if is_spec(mapping):
        mapping = _checked_word(folder, mapping, key, where)
    fields = check_mapping(mapping, where)
    if key not in fields:
        raise ConfigError(f"{where}: {key!r} is missing; known: {', '.join(words(folder))}.")
    word = fields.pop(key)
    cls = load(folder, word, join(where, key))
    if role is not None and role not in cls.roles:
        fits = [w for w in words(folder) if role in getattr(load(folder, w), "roles", ())]
        serves = " and ".join(cls.roles)
        raise ConfigError(f"{join(where, key)}: {word!r} serves {serves} heads; for {role} heads: {', '.join(fits)}.")
    return make(cls, fields, where, f"{key} {word!r}")


def is_spec(value: object) -> bool:
    """Whether a value may be a spec: an object whose class is a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _checked_word(folder: str, spec: Any, key: str, where: str) -> dict[str, Any]:
    """The mapping of a spec, which must be one of this folder."""
    try:
        mapping = dump(spec, key)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    word = mapping[key]
    if word not in words(folder) or qualified(load(folder, word)) != qualified(type(spec)):
        raise wrong(where, spec, f"a spec of {folder} (one of: {', '.join(words(folder))})")
    return mapping


def make(cls: type, mapping: object, where: str = "", name: str = "") -> Any:
    """The dataclass ``cls`` from a mapping of its fields.

    A message of the class's own ``__post_init__`` starts with a field name; ``where`` is put before it.

    Raises:
        ConfigError: unknown, missing or wrong field; the message has its full path, what was given and what fits.
    """
    given = check_mapping(mapping, where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    for key in given:
        if key not in fields:
            known = ", ".join(sorted(fields)) or "none"
            of = f" of {name}" if name else ""
            raise ConfigError(f"{join(where, key)}: unknown key; fields{of}: {known}.{near(key, fields)}")
    values = {key: convert(value, hints[key], join(where, key), fields[key].metadata) for key, value in given.items()}
    missing = [key for key, field in fields.items() if key not in values and is_required(field)]
    if missing:
        raise ConfigError(f"{join(where, missing[0])}: missing; required here: {', '.join(missing)}.")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from None


def dump(spec: Any, key: str | None = None) -> dict[str, Any]:
    """Plain data from which ``build`` (with ``key``: the word comes first) or ``make`` gives an equal object back."""
    plain: dict[str, Any] = {} if key is None else {key: spec_word(spec)}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.init and not (value is None and field.default is None):
            plain[field.name] = _plain(value, field.metadata)
    return plain


def spec_word(spec: Any) -> str:
    """The word of a spec: the name of its file, or the one it was registered as.

    Raises:
        ConfigError: its class is neither in the package nor registered, so a config could not name it.
    """
    cls = type(spec)
    for folder in registered.values():
        for word, thing in folder.items():
            if isinstance(thing, type) and qualified(thing) == qualified(cls):
                return word
    package, _, word = cls.__module__.rpartition(".")
    if not package.startswith("hf_longctx.") or cls.__name__ != class_name(word):
        raise ConfigError(
            f"{cls.__name__} is no word that a config can name: it was not registered. Call "
            f"hf_longctx.register(KIND, WORD, {cls.__name__}) first; KIND is one of: {', '.join(FOLDERS)}."
        )
    return word


def qualified(cls: type) -> tuple[str, str]:
    """Module and name. A class that is defined again, as a notebook cell run twice does, has the same ones."""
    return cls.__module__, cls.__qualname__


def word(folder: str, key: str, role: str, default: str | None = None, instead: type | None = None) -> Any:
    """A dataclass field (typed ``Any``, or ``tuple[Any, ...]`` for a list) that holds a spec of ``folder``.

    Args:
        default: the word, with its own defaults, where the field is not given; None makes the field required.
        instead: a dataclass that a mapping without ``key`` names.
    """
    metadata = {"folder": folder, "key": key, "role": role, "instead": instead}
    if default is None:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default_factory=lambda: load(folder, default)(), metadata=metadata)


def convert(value: object, hint: Any, where: str, metadata: Mapping[str, Any]) -> Any:
    """``value`` as the annotated type ``hint``, or a ConfigError for the path ``where``."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, where, metadata)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise wrong(where, value, "a list")
        check_count(value, where)
        return tuple(convert(item, args[0], f"{where}[{i}]", metadata) for i, item in enumerate(value))
    if origin is dict:
        return {k: convert(v, args[1], join(where, k), metadata) for k, v in check_mapping(value, where).items()}
    if metadata.get("folder"):
        return _convert_word(value, where, metadata)
    if hint is dict:
        return check_plain(check_mapping(value, where), where)
    if dataclasses.is_dataclass(hint):
        return make(hint, value, where)
    return _convert_scalar(value, hint, where, metadata)


def read_fields(pairs: Iterable[str], where: str, example: str) -> dict[str, Any]:
    """``["steps=500"]`` as ``{"steps": 500}``, values as YAML reads them; how fields are given on a command line.

    Raises:
        ConfigError: a pair that is none (the message starts with ``where`` and shows ``example``), or a name twice.
    """
    given: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if name in given:
            raise ConfigError(f"{where}: {name} is given twice.")
        if not equals:
            raise ConfigError(f"{where}: got {short(pair)}, expected NAME=VALUE, e.g. {example}.")
        try:
            given[name] = check_plain(strict_yaml.read(value, name), name)
        except ConfigError as error:
            raise ConfigError(f"{where}: got {short(pair)}, expected NAME=VALUE, e.g. {example}. {error}") from None
    return given


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert_union(value: object, args: tuple, where: str, metadata: Mapping[str, Any]) -> Any:
    if value is None and type(None) in args:
        return None
    hints = [hint for hint in args if hint is not type(None)]
    sections = [hint for hint in hints if dataclasses.is_dataclass(hint)]
    plain = [hint for hint in hints if hint not in sections]
    chosen = sections if sections and (isinstance(value, Mapping) or not plain) else plain
    if sections and chosen is plain:
        keys = " and ".join(field.name for field in dataclasses.fields(sections[0]))
        metadata = {**metadata, "or": f"a mapping of {keys}"}
    return convert(value, chosen[0], where, metadata)


def _convert_word(value: object, where: str, metadata: Mapping[str, Any]) -> Any:
    instead = metadata["instead"]
    key = metadata["key"]
    if metadata.get("bare") and isinstance(value, str):
        value = {key: value}
    if instead is not None and isinstance(value, instead):
        return value
    if instead is not None and isinstance(value, Mapping) and key not in value:
        names = {field.name for field in dataclasses.fields(instead)}
        if names & set(value):
            return make(instead, value, where)
    return build(metadata["folder"], value, key, where, metadata["role"])


def _convert_scalar(value: object, hint: type, where: str, metadata: Mapping[str, Any]) -> Any:
    kinds: dict[type, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    accepted = (int, float) if hint is float else hint
    # To Python a bool is an int; to a reader of the YAML it is not.
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        hint_text = " YAML reads 1e6 as text: write 1.0e+6." if hint is float and isinstance(value, str) else ""
        raise wrong(where, value, kinds[hint] + _bounds(metadata, value), hint_text)
    if "choices" in metadata and hint is str:
        check_word(value, metadata["choices"], where)
    elif not _fits(value, hint, metadata):
        raise wrong(where, value, kinds[hint] + _bounds(metadata, value))
    return hint(value)


def _fits(value: Any, hint: type, metadata: Mapping[str, Any]) -> bool:
    if hint not in (int, float):
        return True
    if "choices" in metadata and value not in metadata["choices"]:
        return False
    low = metadata.get("min")
    high = metadata.get("max")
    above = metadata.get("above")
    too_low = (low is not None and value < low) or (above is not None and value <= above)
    return is_finite(value) and not too_low and not (high is not None and value > high)


def _bounds(metadata: Mapping[str, Any], value: object) -> str:
    """What fits, in words; a maximum that only keeps numbers from overflowing is named where it was passed."""
    if metadata.get("max", 0) >= MOST and not (isinstance(value, (int, float)) and value > metadata["max"]):
        metadata = {key: bound for key, bound in metadata.items() if key != "max" and bound != -LARGEST}
    names: dict[str, Callable[[Any], str]] = {
        "min": lambda bound: f"at least {bound}",
        "above": lambda bound: f"above {bound}",
        "max": lambda bound: f"at most {bound}",
        "choices": lambda choices: f"one of {', '.join(map(str, choices))}",
    }
    said = [say(metadata[name]) for name, say in names.items() if name in metadata]
    unit = f" ({metadata['unit']})" if "unit" in metadata else ""
    instead = f", or {metadata['or']}" if "or" in metadata else ""
    return (", " if said else "") + " and ".join(said) + unit + instead


def _plain(value: Any, metadata: Mapping[str, Any]) -> Any:
    if dataclasses.is_dataclass(value):
        is_word = metadata.get("folder") and type(value) is not metadata["instead"]
        return dump(value, metadata["key"] if is_word else None)
    if isinstance(value, Mapping):
        return {key: _plain(item, metadata) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, metadata) for item in value]
    return value
