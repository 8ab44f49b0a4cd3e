"""Head-classified KV caches and sparse prefill for Hugging Face Transformers. Importing it changes nothing global.

The public names are imported when they are first asked for: `import hf_longctx` imports neither torch nor Transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import LongCtxCache
    from .config import LongCtxConfig
    from .errors import CacheError, ConfigError, LongCtxError, UnsupportedModeError, UnsupportedModelError
    from .evaluate.compare import compare
    from .identify import identify
    from .identify_prefill import identify_prefill
    from .loading import AutoModelForCausalLM, install, uninstall
    from .patch import observe, patch_model, patched, unpatch_model
    from .prompt_cache import PromptCache
    from .report import report

__version__ = "0.1.0"

__all__ = [
    "AutoModelForCausalLM",
    "CacheError",
    "ConfigError",
    "LongCtxCache",
    "LongCtxConfig",
    "LongCtxError",
    "PromptCache",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "compare",
    "identify",
    "identify_prefill",
    "install",
    "observe",
    "patch_model",
    "patched",
    "report",
    "uninstall",
    "unpatch_model",
]

# Where the public names are defined.
_MODULES = {
    "AutoModelForCausalLM": "loading",
    "CacheError": "errors",
    "ConfigError": "errors",
    "LongCtxCache": "cache",
    "LongCtxConfig": "config",
    "LongCtxError": "errors",
    "PromptCache": "prompt_cache",
    "UnsupportedModeError": "errors",
    "UnsupportedModelError": "errors",
    "compare": "evaluate.compare",
    "identify": "identify",
    "identify_prefill": "identify_prefill",
    "install": "loading",
    "observe": "patch",
    "patch_model": "patch",
    "patched": "patch",
    "report": "report",
    "uninstall": "loading",
    "unpatch_model": "patch",
}


if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package, imported now."""
        if name in _MODULES:
            globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
            return found
        if name.isidentifier() and not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))])


class _Package(ModuleType):
    """Python sets a module that it imported as an attribute of its package; here the public name of it stays.

    ``identify``, ``identify_prefill`` and ``report`` are functions in modules of the same name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
