"""PEFT's prompt learning (prompt, prefix and p-tuning and their kin): virtual tokens that no input names."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedModeError


def virtual_tokens(*holders: Any) -> str | None:
    """What adds virtual tokens, in words, if one of ``holders`` is a PEFT model with prompt learning, or is run by one.

    Args:
        holders: models, wrapped or not; None is left out. While PEFT's ``generate`` runs, a method of the model inside
            belongs to the wrapper.
    """
    config = next(filter(None, map(active_config, holders)), None)
    if config is None:
        return None
    return f"PEFT's {kind_of(config)} puts {config.num_virtual_tokens} virtual tokens before every sequence"


def active_config(holder: Any) -> Any:
    """The active config of prompt learning, or None."""
    borrowed = vars(holder).get("prepare_inputs_for_generation") if isinstance(holder, nn.Module) else None
    inside = (getattr(holder, name, None) for name in ("_orig_mod", "module"))
    for one in (holder, getattr(borrowed, "__self__", None), *inside):
        config = getattr(one, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            return config
    return None


def kind_of(config: Any) -> str:
    """PEFT's word for a config's method."""
    return getattr(config.peft_type, "value", config.peft_type)


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
