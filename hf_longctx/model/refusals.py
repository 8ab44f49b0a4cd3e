"""What a call of a patched model, or its generate, is refused for before a layer writes into a cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..cache.cache import LongCtxCache
from ..cache.plan import LayerPlan
from ..cache.seam import CACHE, OTHER, checkpointing_drops_cache
from ..config.words import spec_word
from ..errors import UnsupportedModeError
from ..layout.prompt_learning import active_config, kind_of, virtual_tokens
from ..layout.rows import Rows
from .as_stock import padding_of
from .attention import KNOWN

BY_CACHE = ("PREFIX_TUNING", "CARTRIDGE")  # bring their virtual tokens as a filled cache

# Arguments of packed sequences.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_call(base: nn.Module, given: dict[str, Any]) -> None:
    """Raise unless a patched base model can answer this call.

    Args:
        given: the arguments of its forward by name, the cache under the name of this Transformers.

    Raises:
        UnsupportedModeError: it cannot; the message names the argument.
    """
    _refuse_inputs(given)
    _refuse_unknown(base, given)
    _refuse_modes(given, base.config, base.training)
    _refuse_checkpointing(base, given.get(CACHE))


def refuse_selection(plans: Sequence[LayerPlan], rows: Rows, cache: Any, device: torch.device) -> None:
    """Refuse decoded tokens whose selection would have no index, or would make a GPU wait in every layer.

    Raises:
        UnsupportedModeError: the cache is not ours, or a choice is compared by value on a device.
    """
    if isinstance(cache, LongCtxCache) and device.type == "cpu":
        return
    asked = [role.decode for plan in plans for role in plan.filled if role.selecting(rows)]
    if not asked:
        return
    if not isinstance(cache, LongCtxCache):
        raise UnsupportedModeError(
            f"the config's decode.retrieval selects what a decoded token reads ({spec_word(asked[0])}), by an index "
            f"that a LongCtxCache keeps; this forward got a {type(cache).__name__}. Leave the cache out, pass "
            f"{CACHE}=LongCtxCache(model), or patch with decode={{'retrieval': {{'select': 'dense'}}}}."
        )
    if device.type != "cpu" and any(one.by_sequence for one in asked):
        raise UnsupportedModeError(
            f"decode.retrieval.similar is {asked[0].similar}: whether a choice is used again would be read from "
            f"{device.type} in every layer and for every token. Set similar to null: refresh alone decides then."
        )


def refuse_eviction(plans: Sequence[LayerPlan], base: nn.Module, cache: Any, observed: bool) -> None:
    """Refuse what a store in which the data choose the tokens cannot do, before it is done densely and in silence.

    Raises:
        UnsupportedModeError: in training, under observe(), or over a cache that is not ours.
    """
    ours = isinstance(cache, LongCtxCache)
    if not observed and (ours or (cache is None and not base.training)):
        return  # as at every decoded token
    if (word := evicting(plans)) is None:
        return
    what = f"stores.retrieval ({word}) chooses by the data which cached tokens stay"
    dense = "patch with stores={'retrieval': {'store': 'full'}}"
    if base.training and not ours:
        raise UnsupportedModeError(
            f"{what}, and in training mode there is no cache: every token would be read. Call model.eval(), or {dense} "
            "to train."
        )
    if observed:
        raise UnsupportedModeError(
            f"{what}, and observe() shows the keys of all tokens, of which none would leave. To observe, {dense}."
        )
    if cache is not None and not ours:
        raise UnsupportedModeError(
            f"{what}; this forward got a {type(cache).__name__}, from which none would leave. Leave the cache out, "
            f"pass {CACHE}=LongCtxCache(model), or {dense}."
        )


def evicting(plans: Sequence[LayerPlan]) -> str | None:
    """The word of the store in which the data choose which tokens stay; None where there is none."""
    stores = (role.store for plan in plans for role in plan.filled)
    return next((spec_word(store) for store in stores if store.by_data), None)


def _refuse_inputs(given: dict) -> None:
    cache = given.get(CACHE)
    mask = padding_of(given.get("attention_mask"))
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedModeError(
            f"{CACHE} is a {type(cache).__name__}, which a patched model cannot read: it takes a LongCtxCache or "
            "another Cache of Transformers. To run with this one: model.set_attn_implementation('sdpa')."
        )
    if cache is not None and getattr(cache, "is_compileable", False):
        raise UnsupportedModeError(
            f"{type(cache).__name__} is a static cache, whose layers show more slots than they hold tokens. Leave "
            "cache_implementation out, or reserve memory with LongCtxCache(model, max_tokens=...)."
        )
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        if isinstance(mask, dict):
            raise UnsupportedModeError(
                f"the model made masks of its own ({', '.join(mask)}), which ask for more than causal attention: as "
                "where the tokens of an image see each other. Run it dense: model.set_attn_implementation('sdpa')."
            )
        shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise UnsupportedModeError(
            f"attention_mask is {shape}; a patched model takes a 2D mask [batch, tokens] or none. Other masks run "
            "dense: model.set_attn_implementation('sdpa')."
        )
    packed = [name for name in PACKED if given.get(name) is not None]
    if packed:
        raise UnsupportedModeError(
            f"packed sequences are not supported (given: {', '.join(packed)}). Pass one sequence per row, or run "
            "dense: model.set_attn_implementation('sdpa')."
        )


def _refuse_unknown(base: nn.Module, given: dict) -> None:
    """Arguments that reach the attention function by way of ``**kwargs``."""
    unknown = given.keys() - _parameters(type(base)) - KNOWN
    if asked := sorted(name for name in unknown if given[name] is not None):
        raise UnsupportedModeError(
            f"the model was given {', '.join(asked)}, which neither its forward nor patched attention knows. Leave it "
            "out, or run dense with model.set_attn_implementation('sdpa') if another attention function uses it."
        )


@functools.cache
def _parameters(base: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(base.forward).parameters)


def _refuse_checkpointing(base: nn.Module, cache: Any) -> None:
    """Checkpointed layers are run without their cache, in every Transformers; with its own caches too."""
    if cache is None or not base.training or not checkpointing_drops_cache(torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        raise UnsupportedModeError(
            "gradient checkpointing in training mode runs every layer without the cache, so each new token would see "
            "itself alone. Call model.eval() or model.gradient_checkpointing_disable() around generate(), or pass "
            "use_cache=False."
        )


def _refuse_modes(given: dict, config: Any, training: bool) -> None:
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedModeError(
            "output_attentions=True: a patched model never makes the attention matrix. Use hf_longctx.observe() "
            "or model.set_attn_implementation('eager')."
        )
    if given.get("is_causal") is False or getattr(config, "is_causal", None) is False:
        raise UnsupportedModeError(
            "is_causal=False: a patched model is causal. Unpatch it for bidirectional attention."
        )
    both = getattr(config, "use_bidirectional_attention", None)
    if both in (True, "all"):
        raise UnsupportedModeError(
            f"use_bidirectional_attention={both!r} in the config: each token of this model reads the later ones too, "
            "and a patched model is causal. Unpatch it."
        )
    if training and getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModeError(
            f"attention_dropout={config.attention_dropout} in training: patched attention has no dropout. Set "
            "config.attention_dropout to 0, or train dense with model.set_attn_implementation('sdpa')."
        )


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
    if (config := active_config(model)) is None:
        return
    added = virtual_tokens(model)
    by_cache = kind_of(config) in BY_CACHE
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
