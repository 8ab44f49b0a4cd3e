"""Head-classified KV caches and sparse prefill for Hugging Face Transformers. Importing it changes nothing global.

The public names are imported when they are first asked for: `import hf_longctx` imports neither torch nor Transformers.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.cache import LongCtxCache
    from .config.config import LongCtxConfig
    from .config.register import register
    from .errors import CacheError, ConfigError, LongCtxError, UnsupportedModeError, UnsupportedModelError
    from .evaluate.compare import compare
    from .evaluate.compare_prompts import compare_prompts
    from .identification.contribution import contribution
    from .identification.heads import identify
    from .identification.prefill import identify_prefill
    from .model.attention_mass import attention_mass
    from .model.family import Family
    from .model.loading import AutoModelForCausalLM, AutoModelForImageTextToText, install, uninstall
    from .model.observe import observe
    from .model.patch import patch_model, patched, unpatch_model
    from .model.report import report
    from .prompts.prompt_cache import PromptCache

__version__ = "0.1.0"

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "CacheError",
    "ConfigError",
    "Family",
    "LongCtxCache",
    "LongCtxConfig",
    "LongCtxError",
    "PromptCache",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "attention_mass",
    "compare",
    "compare_prompts",
    "contribution",
    "identify",
    "identify_prefill",
    "install",
    "observe",
    "patch_model",
    "patched",
    "register",
    "report",
    "uninstall",
    "unpatch_model",
]

# Where the public names are defined.
_MODULES = {
    "AutoModelForCausalLM": "model.loading",
    "AutoModelForImageTextToText": "model.loading",
    "CacheError": "errors",
    "ConfigError": "errors",
    "Family": "model.family",
    "LongCtxCache": "cache.cache",
    "LongCtxConfig": "config.config",
    "LongCtxError": "errors",
    "PromptCache": "prompts.prompt_cache",
    "UnsupportedModeError": "errors",
    "UnsupportedModelError": "errors",
    "attention_mass": "model.attention_mass",
    "compare": "evaluate.compare",
    "compare_prompts": "evaluate.compare_prompts",
    "contribution": "identification.contribution",
    "identify": "identification.heads",
    "identify_prefill": "identification.prefill",
    "install": "model.loading",
    "observe": "model.observe",
    "patch_model": "model.patch",
    "patched": "model.patch",
    "register": "config.register",
    "report": "model.report",
    "uninstall": "model.loading",
    "unpatch_model": "model.patch",
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
