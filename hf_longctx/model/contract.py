"""Whether the Transformers that is here still has the seams that a patch stands on; asked when a model is patched.

``tests/contract`` has the whole list of facts, each with a test. Those that can be asked of the classes alone, in
milliseconds, are asked here, so that a version nobody has tested yet works where it can and fails in a sentence.
"""

from __future__ import annotations

import functools
import inspect
import logging

import transformers
from torch import nn

from ..cache.layer import LongCtxLayer
from ..cache.seam import CACHE
from ..errors import UnsupportedModelError

# versions the tests ran on
OLDEST = "5.0"
NEWEST = "5.24"
PREPARE = ("generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length")

logger = logging.getLogger(__name__)


def check_transformers(model: nn.Module, base: nn.Module, attention: nn.Module) -> None:
    """Check the facts for one model; log once that a version is newer than the tested ones.

    Args:
        model: the model to be patched, unwrapped.
        base: its base model.
        attention: one of its attention modules.

    Raises:
        UnsupportedModelError: a fact does not hold.
    """
    _warn_untested(transformers.__version__)
    broken = [fact for fact, holds in _facts(model, base, attention).items() if not holds]
    if broken:
        raise UnsupportedModelError(
            f"Transformers {transformers.__version__} does not fit this version of hf_longctx, which was tested with "
            f"{OLDEST} to {NEWEST}: {'; '.join(broken)}. Install one of those, or a newer hf_longctx."
        )


def _facts(model: nn.Module, base: nn.Module, attention: nn.Module) -> dict[str, bool]:
    """What is said where it does not hold -> whether it holds."""
    prepare = getattr(type(model), "_prepare_cache_for_generation", None)  # a base model alone has none
    asked = () if prepare is None else tuple(inspect.signature(prepare).parameters)[1:]
    abstract = sorted(LongCtxLayer.__abstractmethods__)
    return {
        f"the forward of {type(base).__name__} takes no '{CACHE}'": CACHE in _parameters(base),
        f"the forward of {type(attention).__name__} takes no '{CACHE}'": CACHE in _parameters(attention),
        f"_prepare_cache_for_generation takes {', '.join(asked)}": prepare is None or asked == PREPARE,
        f"a cache layer must have {', '.join(abstract)}": not abstract,
    }


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)


@functools.cache
def _warn_untested(version: str) -> None:
    if _minor(version) > _minor(NEWEST):
        logger.warning(
            "Transformers %s is newer than the versions hf_longctx was tested with (%s to %s)", version, OLDEST, NEWEST
        )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
