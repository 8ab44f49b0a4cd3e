"""Every key of a config as Markdown, from the dataclasses themselves: ``docs/reference.md`` is this text."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from . import sections as config_sections
from .bounds import LARGEST, MOST
from .config import LongCtxConfig, kernel_words
from .words import dump, is_required, load, registered, spec_word, words

# Folder -> the key that names its words
FOLDERS = {"stores": "store", "prefill": "pattern", "decode": "select", "eviction": "score", "eviction.after": "after"}
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", dict: "any mapping"}
INTRODUCTION = """\
# Config reference

```sh
hf-longctx configs reference
```

Made by `hf-longctx configs reference` from the code; [configuration.md](configuration.md) explains what to use.
A key without a default is required.
"""


def reference() -> str:
    """All sections, then the words of every folder, then the kernels."""
    parts = [INTRODUCTION, _section("The file", LongCtxConfig)]
    for name, cls in _nested(LongCtxConfig):
        parts.append(_section(f"`{name}`", cls))
    for folder, key in FOLDERS.items():
        for word in words(folder):
            cls = load(folder, word)
            serves = " and ".join(cls.roles)
            own = word in registered[folder]
            title = f"`{key}: {word}` in {folder.replace('.', '/')} ({serves} heads)"
            parts.append(_section(title, cls, own))
            parts += [_section(f"`{name}` of `{key}: {word}`", inner, own) for name, inner in _nested(cls)]
    return "\n".join([*parts, _kernels()])


def meanings(cls: type) -> dict[str, str]:
    """Field name -> what the ``Attributes`` of the class's docstring, or of its bases', say of it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        doc = inspect.cleandoc(vars(base).get("__doc__") or "")
        _, _, listed = doc.partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w)", "\n" + listed.split("\n\n")[0]):
            names, colon, text = entry.strip().partition(": ")
            if colon:
                found |= dict.fromkeys(names.split(", "), _text(text))
    return found


def _nested(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """(path, class) of every dataclass below ``cls`` that is not a word's."""
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        where = f"{path}.{field.name}" if path else field.name
        inner = [one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)]
        for one in inner:
            where += ".NAME" if typing.get_origin(hint) is dict else ""
            yield where, one
            yield from _nested(one, where)


def _section(title: str, cls: type, registered_class: bool = False) -> str:
    said = meanings(cls)
    hints = typing.get_type_hints(cls)
    if registered_class:  # the package's own classes say what every key means
        said = dict.fromkeys((field.name for field in dataclasses.fields(cls)), "") | said
    lines = [f"## {title}", "", _first_paragraph(cls.__doc__), ""]
    rows = [
        f"| `{f.name}` | {_type(hints[f.name], f.metadata)} | {_default(f)} | {said[f.name]} |"
        for f in dataclasses.fields(cls)
        if f.init
    ]
    if rows:
        lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _first_paragraph(doc: str) -> str:
    return _text(inspect.cleandoc(doc).split("\n\n")[0])


def _text(doc: str) -> str:
    """One line, with the code marks of Markdown."""
    return " ".join(doc.replace("``", "`").split())


def _type(hint: Any, metadata: typing.Mapping[str, Any]) -> str:
    """What may stand there, with its bounds and unit."""
    origin = typing.get_origin(hint)
    args = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if metadata.get("folder"):
        article = "an" if metadata["key"][0] in "aeiou" else "a"
        given = f"{article} `{metadata['key']}` for {metadata['role']} heads"
        given = f"a list, each {given}" if origin is tuple else given
        return given + (", or `{table: NAME}`" if metadata["instead"] is config_sections.TableUse else "")
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(arg, metadata) for arg in args)
    if origin is tuple:
        return f"list of: {_type(args[0], metadata)}"
    if origin is dict:
        return f"by name: {_type(args[1], metadata)}"
    if dataclasses.is_dataclass(hint):
        return "mapping, see below"
    if "choices" in metadata:
        return " or ".join(f"`{choice}`" for choice in metadata["choices"])
    bounds = [f"{word} {metadata[key]}" for key, word in BOUNDS.items() if key in metadata and _telling(metadata[key])]
    unit = f" ({metadata['unit']})" if "unit" in metadata else ""
    return ", ".join([PLAIN[hint], *bounds]) + unit


BOUNDS = {"min": ">=", "above": ">", "max": "<="}


def _telling(bound: float) -> bool:
    """Bounds that only keep numbers from overflowing tell a reader nothing."""
    return abs(bound) < MOST and abs(bound) != LARGEST


def _default(field: dataclasses.Field) -> str:
    if is_required(field):
        return ""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if field.metadata.get("folder"):
        return f"`{spec_word(value)}`"
    if value is None:
        return "none"
    if dataclasses.is_dataclass(value):
        return "all defaults" if _is_default(value) else f"`{_flow(dump(value))}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _is_default(value: Any) -> bool:
    """Whether the class makes it of nothing."""
    try:
        return type(value)() == value
    except ConfigError:
        return False


def _flow(plain: typing.Mapping[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in plain.items()) + "}"


def _kernels() -> str:
    lines = ["## `kernel`", "", "How attention is computed, never what.", "", "| word | what it is |", "|---|---|"]
    own = {
        "auto": "The fastest kernel that computes the case.",
        "stock": "Transformers' own SDPA call where it can be.",
    }
    for name in kernel_words():
        about = own.get(name) or _first_paragraph(_docstring(name))
        lines.append(f"| `{name}` | {about} |")
    return "\n".join([*lines, ""])


def _docstring(kernel: str) -> str:
    """Of a module that is not imported: a kernel may need what is not installed."""
    if kernel in registered["kernels"]:
        return registered["kernels"][kernel].__doc__ or ""
    module = f"hf_longctx.kernels.{kernel}"
    source = importlib.util.find_spec(module).loader.get_source(module)
    return ast.get_docstring(ast.parse(source))
