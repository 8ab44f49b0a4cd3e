"""PEFT's prompt learning (prompt, prefix and p-tuning and their kin): virtual tokens that no input names."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .errors import UnsupportedModeError
from .seam import CACHE, OTHER

BY_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # bring their virtual tokens as a filled cache


def virtual_tokens(*holders: Any) -> str | None:
    """What adds virtual tokens, in words, if one of ``holders`` is a PEFT model with prompt learning, or is run by one.

    Args:
        holders: models, wrapped or not; None is left out. While PEFT's ``generate`` runs, a method of the model inside
            belongs to the wrapper.
    """
    config = next(filter(None, map(_active, holders)), None)
    if config is None:
        return None
    return f"PEFT's {_kind(config)} puts {config.num_virtual_tokens} virtual tokens before every sequence"


def _active(holder: Any) -> Any:
    """The active config of prompt learning, or None."""
    borrowed = vars(holder).get("prepare_inputs_for_generation") if isinstance(holder, nn.Module) else None
    inside = (getattr(holder, name, None) for name in ("_orig_mod", "module"))
    for one in (holder, getattr(borrowed, "__self__", None), *inside):
        config = getattr(one, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return config
    return None


def _kind(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def refuse_lost_prompt(model: nn.Module, use_cache: bool) -> None:
    """Refuse what PEFT's ``generate`` gets wrong with prompt learning, on every model, patched or not.

    A PEFT from before Transformers renamed the cache looks for it in vain and takes every step for the first: prompt
    tuning adds its tokens at every step, and the prefix of prefix tuning is left out. Without a cache every step is the
    first, but prefix tuning brings a cache, to which each step then adds the whole text.

    Args:
        model: the Transformers model inside, while PEFT's ``generate`` runs it.

    Raises:
        UnsupportedModeError: the active adapter is of prompt learning, and its answer would be wrong.
    """
    if (config := _active(model)) is None:
        return
    added, by_cache = virtual_tokens(model), _kind(config) in BY_CACHE
    if not use_cache and by_cache:
        raise UnsupportedModeError(
            f"{added}, as a cache that generate(use_cache=False) reads the whole text over at every step. Set "
            "use_cache=True."
        )
    prepare = getattr(vars(model).get("prepare_inputs_for_generation"), "__func__", None)
    if use_cache and prepare is not None and CACHE not in inspect.unwrap(prepare).__code__.co_consts:
        instead = "Install" if by_cache else "Pass use_cache=False, or install"
        raise UnsupportedModeError(
            f"{added}, and this version of PEFT asks generate() for '{OTHER}', which this Transformers calls "
            f"'{CACHE}': it would add them at every step, or leave them out. {instead} a newer PEFT or an older "
            "Transformers."
        )


def refuse_prompt_learning(model: nn.Module) -> None:
    """PromptCache counts the tokens that it gives; virtual ones come on top, in every forward.

    Raises:
        UnsupportedModeError: the model's active adapter is of prompt learning.
    """
    if (added := virtual_tokens(model)) is not None:
        raise UnsupportedModeError(
            f"PromptCache: {added}, with each question once more, so a prompt that was read cannot be gone on from. "
            "Call generate() with the whole text, or use an adapter of the weights (LoRA, IA3)."
        )
