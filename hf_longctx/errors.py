"""The errors of this library. Each message says what was given, what is supported, and what to do."""

from __future__ import annotations


class LongCtxError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(LongCtxError, ValueError):
    """A config has a wrong key, type, bound or shape, or was made for another model."""


class UnsupportedModelError(LongCtxError, TypeError):
    """The model's family or attention cannot be patched."""


class UnsupportedModeError(LongCtxError, RuntimeError):
    """The call asks for a mode that a patched model refuses, because its answer would be wrong or silently dense."""


class CacheError(LongCtxError, RuntimeError):
    """A cache is in a state from which the requested step would give a wrong answer."""
