"""Strict YAML: plain data of limited size, or a ConfigError, whatever the text is."""

from __future__ import annotations

from typing import Any

import yaml

from ..errors import ConfigError

LARGEST_TEXT = 10**6  # characters; the largest shipped config has 24,000, and a megabyte of numbers takes seconds
LONGEST_NUMBER = 400  # characters
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class StrictLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """``yaml.safe_load`` that refuses a key given twice, and numbers that take long to read."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in NUMBERS and isinstance(node.value, str) and len(node.value) > LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )
        return super().construct_scalar(node)


def read(text: str, where: str) -> Any:
    """What a YAML text holds.

    Raises:
        ConfigError: larger than ``LARGEST_TEXT``, not YAML, a key given twice, an alias, or a tag (``!!int ''``,
            ``!!python/...``) that its value does not fit.
    """
    check_size(len(text), where)
    try:
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, StrictLoader)):
            raise ConfigError(f"{where}: YAML aliases (*name) are not read; write the values out.")
        return yaml.load(text, StrictLoader)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML that this library reads: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # PyYAML's own readers of tagged values fail in many ways: `!!int ''` is an IndexError, `!!bool x` a KeyError.
        said = f"{type(error).__name__} {error}"[:200]
        raise ConfigError(
            f"{where}: not YAML that this library reads: a tag such as !!int on a value that it does not fit, or a "
            f"date or number that there is none of ({said})."
        ) from None


def check_size(size: int, where: str) -> None:
    """Raise ConfigError for a text that is too large to be a config."""
    if size > LARGEST_TEXT:
        raise ConfigError(
            f"{where}: larger than {LARGEST_TEXT / 1e6:g} MB, the most that is read; the largest shipped config has "
            "24 kB. Is it a config?"
        )
