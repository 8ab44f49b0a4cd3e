"""The entry point of vLLM's ``vllm.general_plugins``: nothing, unless ``HF_LONGCTX_VLLM`` names a config."""

from __future__ import annotations

import functools
import os
from typing import Any

from ...errors import ConfigError

SWITCH = "HF_LONGCTX_VLLM"
OFF = ("", "0")


def asked() -> str | None:
    """The config that ``HF_LONGCTX_VLLM`` names: what ``patch_model`` takes as text; None where it is off.

    Raises:
        ConfigError: it is 1, which names none.
    """
    given = os.environ.get(SWITCH, "").strip()
    if given == "1":
        raise ConfigError(f"{SWITCH}: got 1. What works: auto, the name of a shipped config, or the path of a .yaml.")
    return None if given in OFF else given


def register() -> None:
    """Let vLLM, in this process, load models with split heads where ``HF_LONGCTX_VLLM`` asks for it.

    vLLM calls it in each of its processes, perhaps more than once.

    Raises:
        ConfigError: as `asked`.
    """
    if asked() is None:
        return
    from vllm.model_executor.models import ModelRegistry

    from . import kv_cache

    kv_cache.register()
    if not isinstance(ModelRegistry.resolve_model_cls, functools.partial):
        ModelRegistry.resolve_model_cls = functools.partial(_resolve, ModelRegistry.resolve_model_cls)


def _resolve(original: Any, *given: Any, **more: Any) -> tuple[Any, str]:
    """What vLLM resolves an architecture to, with split heads. Every model passes here, so none is dense unsaid."""
    from .model import split

    cls, architecture = original(*given, **more)
    named = asked()
    return (cls if named is None else split(cls, architecture, named)), architecture
