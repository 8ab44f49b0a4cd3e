"""Head-classified KV caches and sparse prefill for Hugging Face Transformers. Importing it changes nothing global."""

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
