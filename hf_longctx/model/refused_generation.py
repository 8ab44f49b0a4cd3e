"""What generate() of a patched model is refused for before it reads its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..cache.cache import LongCtxCache
from ..cache.plan import LayerPlan
from ..cache.seam import CACHE
from ..errors import UnsupportedModeError
from .refusals import evicting, refuse_lost_prompt

# cache_implementation words of generate(): those that mean a LongCtxCache ("dynamic_full" is what Transformers 5.0
# asks of an assistant), and those that keep Transformers' own cache.
OURS = (None, "dynamic", "dynamic_full")
DENSE_MEMORY = ("offloaded", "quantized")


def refuse_generate(
    model: nn.Module, plans: Sequence[LayerPlan], cache: Any, generation_config: Any, given: tuple
) -> None:
    """What generate() would do wrong with this cache, or with none."""
    asked = generation_config.cache_implementation
    if cache is None and asked not in (*OURS, *DENSE_MEMORY):
        raise UnsupportedModeError(
            f"cache_implementation='{asked}' is a fixed-size cache that a patched model cannot read. Leave it out, "
            f"or pass {CACHE}=LongCtxCache(model, max_tokens=...) to reserve memory."
        )
    selects = any(role.selects for plan in plans for role in plan.filled)
    if generation_config.use_cache is False and selects:
        raise UnsupportedModeError(
            "use_cache=False (an argument, or in a generation config): every token would be read as the end of a new "
            "prompt, and the config's decode.retrieval says what decoded tokens read. Set use_cache=True, or patch "
            "with decode={'retrieval': {'select': 'dense'}}."
        )
    if generation_config.use_cache is False and (word := evicting(plans)):
        raise UnsupportedModeError(
            f"use_cache=False (an argument, or in a generation config): stores.retrieval ({word}) chooses which cached "
            "tokens stay, and nothing would be cached. Set use_cache=True, or patch with stores={'retrieval': "
            "{'store': 'full'}}."
        )
    if cache is not None and generation_config.use_cache is False:
        raise UnsupportedModeError(
            "use_cache=False (an argument, or in a generation config) with a cache: Transformers would read the whole "
            "text at every step, on top of what the cache holds, and answer wrongly. Set use_cache=True, or leave out "
            "the cache."
        )
    refuse_lost_prompt(model, generation_config.use_cache is not False)
    drafts = "assisted_generation" in (getattr(one, "value", None) for one in given)
    if drafts or getattr(generation_config, "is_assistant", False):
        _refuse_regular(plans)
    if drafts and isinstance(cache, LongCtxCache) and cache.seen:
        _refuse_drafts()


def _refuse_drafts() -> None:
    """Seen in Transformers 5.23, with its own caches too: the first step reads what the cache holds once more."""
    raise UnsupportedModeError(
        "assisted decoding and prompt lookup over a cache that was filled before: Transformers would read the "
        "whole prompt a second time, and answer wrongly. Leave out assistant_model and prompt_lookup_num_tokens, "
        "or start with a new cache."
    )


def _refuse_regular(plans: Sequence[LayerPlan]) -> None:
    """Drafts are taken back, and what was evicted since they were read cannot be."""
    stores = [role.store for plan in plans for role in plan.filled]
    if regular := [store for store in stores if store.every is not None]:
        raise UnsupportedModeError(
            f"assisted decoding and prompt lookup with stores.retrieval.every = {regular[0].every}: rejected drafts "
            "are rolled back, and tokens that left the cache while they were read cannot be. Set every to null "
            "(an eviction where the prompt ends alone), or leave out assistant_model and prompt_lookup_num_tokens."
        )
