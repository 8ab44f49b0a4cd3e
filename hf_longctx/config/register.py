"""``register``: a word for what the running program brings itself, usable wherever a word of the package is."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import keyword
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from .checks import LONGEST, check_word, short, wrong
from .words import FOLDERS, qualified, registered, words

# Kind -> the base of its classes, and the key that names its words in a config.
BASES = {
    "store": ("stores.base", "StoreSpec", "store"),
    "prefill": ("prefill.base", "PatternSpec", "pattern"),
    "decode": ("decode.base", "SelectSpec", "select"),
    "eviction": ("eviction.base", "Score", "score"),
    "after": ("eviction.after.base", "After", "after"),
    "heads": ("identification.methods.base", "Method", "method"),
    "task": ("tasks.base", "Task", "task"),
}
WITH_ROLES = ("store", "prefill", "decode", "eviction", "after")
WITH_PAPER = ("eviction", "heads")
ROLES = ("retrieval", "streaming")
PLAIN = (int, float, str, bool, dict)
KERNEL = ("NAME", "PREFERENCE", "READS", "supports", "attend")


def register(kind: str, word: str, thing: Any) -> None:
    """Make ``word`` name ``thing`` in YAML, ``config.json``, on the command line and in ``patch_model``.

    It holds in this process; a program that loads such a config, or a saved cache, registers first. The same thing may
    be registered again. A class that is defined again, as by a notebook cell run twice, takes the place of the earlier.

    Args:
        kind: ``store``, ``prefill``, ``decode``, ``eviction`` (a score), ``after`` (of an eviction), ``heads`` (an
            identification method), ``task``, ``kernel`` or ``family``.
        word: small letters, digits and underscores; of a family, its ``model_type``.
        thing: of the first seven kinds the class, a frozen dataclass that extends the kind's base; of ``kernel`` a
            module or object with what ``kernels/base.py`` asks of one; of ``family`` a ``Family``.

    Raises:
        ConfigError: no such kind, a word that is taken or malformed, or a thing that lacks what its kind needs.
    """
    check_word(kind, FOLDERS, "register: kind")
    if not isinstance(word, str) or not (word if kind == "family" else re.fullmatch("[a-z][a-z0-9_]*", word)):
        fits = "the model_type" if kind == "family" else "small letters, digits and underscores, a letter first"
        raise wrong("register: word", word, fits)
    if keyword.iskeyword(word) or word in ("auto", "stock", "base", "table") or len(word) > LONGEST:
        raise wrong("register: word", word, "a short word that means nothing yet")
    where = f"register({kind!r}, {short(word)}, ...)"
    check = {"kernel": _check_kernel, "family": _check_family}.get(kind, _check_class)
    check(kind, word, thing, where)
    _check_free(FOLDERS[kind], word, thing, where)
    registered[FOLDERS[kind]][word] = thing


def _check_free(folder: str, word: str, thing: Any, where: str) -> None:
    """Refuse a word that means something else."""
    here = registered[folder]
    if word in here:
        if not _same(here[word], thing):
            raise ConfigError(f"{where}: the word was registered before, as {short(here[word])}. Choose another word.")
    elif word in words(folder):
        raise ConfigError(f"{where}: the package has that word already. Choose another word.")
    if isinstance(thing, type):
        other = [name for name, known in here.items() if name != word and _same(known, thing)]
        if other:
            raise ConfigError(
                f"{where}: {thing.__name__} was registered before, as {other[0]!r}; a class has one word."
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, type) and isinstance(other, type):
        return qualified(one) == qualified(other)
    return one is other or (dataclasses.is_dataclass(one) and one == other)


def _check_class(kind: str, word: str, thing: Any, where: str) -> None:
    module, name, key = BASES[kind]
    base = getattr(importlib.import_module(f"hf_longctx.{module}"), name)
    if not (isinstance(thing, type) and issubclass(thing, base) and thing is not base):
        raise wrong(where, thing, f"a class that extends hf_longctx.{module}.{name}")
    given = f"{where}: {thing.__name__}"
    parameters = vars(thing).get("__dataclass_params__")
    if parameters is None or not parameters.frozen or not parameters.eq:
        raise ConfigError(f"{given} is no frozen dataclass. Put @dataclass(frozen=True) on it.")
    if thing.__module__.partition(".")[0] == "hf_longctx":
        raise ConfigError(f"{given} is of the package, where the name of its file is its word.")
    if inspect.isabstract(thing):
        raise ConfigError(f"{given} lacks: {', '.join(sorted(thing.__abstractmethods__))}.")
    if kind in WITH_ROLES and not (thing.roles and set(thing.roles) <= set(ROLES)):
        raise ConfigError(f"{given}.roles is {short(thing.roles)}, expected a tuple of: {', '.join(ROLES)}.")
    if kind == "prefill" and thing.select.__func__ is base.select.__func__:
        raise ConfigError(f"{given} lacks: select.")
    if kind == "decode":
        _check_selection(thing, f"hf_longctx.{module}", given)
    if kind in WITH_PAPER and not isinstance(getattr(thing, "paper", None), str):
        raise ConfigError(f"{given} lacks: paper, a text that says where the method comes from.")
    _check_fields(thing, key, given)


def _check_selection(cls: type, module: str, given: str) -> None:
    """Refuse a selection that does not say what a decoded token reads."""
    base = importlib.import_module(module).Select
    if not cls.reads_all and not issubclass(cls, base):
        raise ConfigError(
            f"{given} lacks: choose. Extend {module}.Select, or set reads_all where it reads every token."
        )
    if issubclass(cls, base) and all(
        getattr(cls, name) is getattr(base, name) for name in ("scores", "pick", "choose")
    ):
        raise ConfigError(f"{given} lacks: scores.")


def _check_fields(cls: type, key: str, given: str) -> None:
    """Refuse fields that YAML could not say."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise ConfigError(f"{given} has annotations that cannot be read ({error}). Define it in a module.") from None
    for field in dataclasses.fields(cls):
        if field.name == key:
            raise ConfigError(f"{given}.{key}: this key names the word itself. Give the field another name.")
        unfit = [
            leaf for leaf in _leaves(hints[field.name]) if leaf not in PLAIN and not dataclasses.is_dataclass(leaf)
        ]
        if field.init and unfit and not field.metadata.get("folder"):
            raise ConfigError(
                f"{given}.{field.name} has type {short(unfit[0])}, which YAML cannot say. What works: int, float, str, "
                "bool, dict, tuple[..., ...], a dataclass, or one of these or None."
            )


def _leaves(hint: Any) -> Iterator[Any]:
    """The types inside an annotation that `convert` takes, or the annotation itself where it takes none."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for one in args:
            yield from () if one is type(None) else _leaves(one)
    elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        yield from _leaves(args[0])
    elif origin is dict and args[0] is str:
        yield from _leaves(args[1])
    else:
        yield hint


def _check_kernel(kind: str, word: str, thing: Any, where: str) -> None:
    lacks = [name for name in KERNEL if not hasattr(thing, name)]
    lacks += [name for name in ("supports", "attend") if name not in lacks and not callable(getattr(thing, name))]
    if lacks:
        raise ConfigError(f"{where}: {short(thing)} lacks: {', '.join(lacks)}.")
    if not callable(getattr(thing, "preference", print)):
        raise wrong(f"{where}: preference", thing.preference, "a function of the case, or nothing")
    if word != thing.NAME:
        raise wrong(f"{where}: NAME", thing.NAME, f"the word, {word!r}")
    if type(thing.PREFERENCE) is not int:
        raise wrong(f"{where}: PREFERENCE", thing.PREFERENCE, "a whole number")
    known = typing.get_args(importlib.import_module("hf_longctx.layout.reads").Reads)
    if not (isinstance(thing.READS, frozenset) and thing.READS and thing.READS.issubset(known)):
        names = ", ".join(one.__name__ for one in known)
        raise wrong(
            f"{where}: READS", thing.READS, f"a frozenset of the classes of reads that it computes, of: {names}"
        )


def _check_family(kind: str, word: str, thing: Any, where: str) -> None:
    family = importlib.import_module("hf_longctx.model.family").Family
    if not isinstance(thing, family):
        raise wrong(where, thing, "a hf_longctx.Family")
    if word != thing.model_type:
        raise wrong(f"{where}: model_type", thing.model_type, f"the word, {short(word)}")
