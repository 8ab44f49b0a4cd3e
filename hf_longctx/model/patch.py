"""patch_model, unpatch_model, patched, unpatched: switch one model over, and back."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..cache.plan import RolePlan
from ..cache.stock_layers import stock_layers
from ..config.config import LongCtxConfig
from ..config.find import resolve
from ..config.words import spec_word
from ..errors import UnsupportedModeError, UnsupportedModelError
from ..kernels import base as kernels
from ..layout.blocks import BlockList
from ..stores.base import StoreSpec
from .attention import NAME, register
from .compiled import GiveCacheBack
from .compiled_generate import ON_COMPILED
from .contract import check_transformers
from .family import Family, find_family
from .hooks import ON_MODEL, BeforeForward, OnModel
from .modules import attention_copies, attention_modules, language_model, name_of, state_of, unwrap
from .output_head import SeeHidden, asks_surprisal, surprisal_head
from .overrides import keywords
from .plans import asks_rotation, make_plan, make_rotations
from .private_config import PrivateConfig, around
from .state import PatchState
from .trial import refusal

UNMEASURED = "the heads of this model were not measured, so all of them keep every token and no memory is saved"
WINDOWS_ALONE = (
    "every layer has a sliding window of the model's own, so no head has a role. Where no text is longer than that, "
    "load with sliding_window=None"
)

logger = logging.getLogger(__name__)


def patch_model(
    model: nn.Module | None = None,
    /,
    config: str | Path | dict | LongCtxConfig = "auto",
    *,
    heads: dict[str, Any] | None = None,
    stores: dict[str, Any] | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    kernel: str | None = None,
    **others: Any,
) -> nn.Module:
    """Make every KV head of ``model`` keep only what its role needs, and return the same model.

    From then on ``generate``, ``pipeline`` and plain calls use a ``LongCtxCache``. A model that is patched already gets
    the new config. No weight is touched.

    Args:
        model: a loaded Llama, Mistral or Qwen model, or of another type in ``patches/``, also inside a PEFT wrapper or
            under tensor parallel.
        config: "auto" (the model's own ``config.longctx``, else the shipped config made for it), a shipped name or a
            hub id that a shipped config lists (both in any case), the path of a YAML, a Hub repository with a
            ``longctx.yaml`` ("user/repo" or "user/repo@revision"), a dict, or a ``LongCtxConfig``. Only a repository
            is fetched.
        heads, stores, prefill, decode, kernel: sections merged into the config, e.g.
            ``heads={"retrieval_fraction": 0.25}``. None: as in the config.
        others: ``model={...}``, the section that says which model the config fits, merged as well.
            ``model={"fingerprint": {"vocab_size": None}}`` stops checking the vocabulary.

    Raises:
        UnsupportedModelError: the model type has no record in ``patches/``; the message says what a tiny copy shows.
        ConfigError: no config fits, the config was made for another model, or an unknown keyword.
        UnsupportedModeError: the config names a kernel that cannot run its prefill pattern, or a store of retrieval
            heads that does not read every token.

    Papers: head roles, DuoAttention arXiv:2410.10819; sinks, StreamingLLM arXiv:2309.17453.
    """
    given = {"heads": heads, "stores": stores, "prefill": prefill, "decode": decode, "kernel": kernel}
    model, sections = keywords("patch_model", model, given, others)
    hf_config = language_model(model).config
    family = _family_of(model)
    if config == "auto" and (state := state_of(model)) and hf_config.longctx == state.config.to_dict():
        config = state.config  # given in this process: it may name paths, which a config that came with a model may not
    settings = resolve(config, hf_config, name_of(model), sections)
    _apply(_patched_as(model), settings, family)
    if WINDOWS_ALONE in state_of(model).log.notes:
        logger.warning("%s", WINDOWS_ALONE)
    if UNMEASURED in state_of(model).log.notes:
        logger.warning("%s: hf-longctx identify measures them", UNMEASURED)
    if (scaled := settings.model.rope_note(hf_config)) is not None:
        logger.warning("%s", scaled)
    return model


def _family_of(model: nn.Module) -> Family:
    """The family of the model; where there is no record of it, the error says what a tiny copy shows."""
    base = language_model(model)
    try:
        return find_family(base.config.model_type)
    except UnsupportedModelError:
        raise refusal(base, _apply) from None


def _refuse_store(store: StoreSpec, what: str, instead: str) -> None:
    if not store.reads_all:
        raise UnsupportedModeError(
            f"stores.retrieval: with {spec_word(store)!r} a token does not read all before it, and {what} chooses "
            f"among those. Set {instead}, or stores.retrieval to {{store: full}}."
        )


def _refuse_uneven(store: StoreSpec) -> None:
    if not store.alike:
        raise UnsupportedModeError(
            f"stores.retrieval: with {spec_word(store)!r} by {store.by!r} heads keep different tokens in different "
            "numbers, and a decode selection chooses the same pages' places in all of them. Set by to uniform or layer "
            "(after: drop), or decode.retrieval to {select: dense}."
        )


def _refuse_learning(role: RolePlan) -> None:
    if role.decode.queries and role.store.by_data:
        raise UnsupportedModeError(
            f"decode.retrieval: select {spec_word(role.decode)!r} learns from a prompt's queries which keys belong "
            f"together, and store {spec_word(role.store)!r} has others once the prompt has ended. Use another "
            "selection, such as page_bounds, or stores.retrieval: {store: full}."
        )


def _apply(model: nn.Module, settings: LongCtxConfig, family: Family) -> None:
    """Patch with a config that fits: all plans are made before anything is changed."""
    inner = unwrap(model)
    base = language_model(model)
    every = attention_modules(base, family)
    modules = [module for module in every if family.has_roles(base.config, module.layer_idx)]
    if not modules:
        raise UnsupportedModelError(
            f"no layer of this {base.config.model_type} has attention over the whole text or over a sliding window, so "
            "there is nothing to patch."
        )
    check_transformers(inner, base, attention_copies(modules[0], family)[0])
    turned = {}
    if asks_rotation(settings):
        with unpatched(model):
            turned = make_rotations(base, settings, family)
    head = None
    if asks_surprisal(settings):
        with unpatched(model):
            head = weakref.ref(surprisal_head(inner))
    plans = [make_plan(module, settings, family, base.config, turned.get(module.layer_idx)) for module in modules]
    stock_layers(base.config, {plan.layer_idx for plan in plans})  # refuses a model whose other layers have no place
    for role in [role for plan in plans for role in plan.roles]:
        if role.prefill is not None:
            _refuse_store(role.store, "a prefill pattern", "prefill.retrieval to {pattern: dense}")
            kernels.require(settings.kernel, BlockList, "this config's prefill pattern")
        if role.selects:
            _refuse_store(role.store, "a decode selection", "decode.retrieval to {select: dense}")
            _refuse_uneven(role.store)
            _refuse_learning(role)

    unpatch_model(model)
    register()
    original = base.config
    private = copy.deepcopy(original)
    private.longctx = settings.to_dict()
    private._attn_implementation = NAME
    text = PrivateConfig.of(original, private)
    configs = (text, *around(model, text))
    for one in configs:
        one.put(model)
    for module, plan in zip(modules, plans, strict=True):
        for part in attention_copies(module, family):
            part.longctx_plan = plan
            part.config = private
    for module in every:
        module.longctx_stock = module not in modules
    compiles = (
        len(plans) == original.num_hidden_layers
        and len(modules) == len(every)
        and not any(plan.scores for plan in plans)
        and head is None
    )
    refs = {"whole": weakref.ref(model), "base": weakref.ref(base), "head": head}
    base.longctx_state = PatchState(settings, configs, tuple(plans), compiles=compiles, **refs)
    unmeasured = settings.heads.source and settings.heads.confidence == "none"
    if unmeasured and "S" not in "".join(settings.roles()) and spec_word(settings.stores.retrieval) == "full":
        base.longctx_state.note(UNMEASURED)
    if all(plan.window is not None for plan in plans):
        base.longctx_state.note(WINDOWS_ALONE)
    if settings.kernel == "stock" and family.scores:
        base.longctx_state.note(
            f"kernel stock: it computes no {', '.join(family.scores.values())}, the default kernel ran"
        )
    if (scaled := settings.model.rope_note(original)) is not None:
        base.longctx_state.note(scaled)
    base.register_forward_pre_hook(BeforeForward(base.longctx_state), with_kwargs=True)
    base.register_forward_hook(GiveCacheBack())
    if head is not None:
        base.register_forward_hook(SeeHidden(), with_kwargs=True)
    for replacement in (*ON_MODEL, *ON_COMPILED):
        if hasattr(type(inner), replacement.name):
            setattr(inner, replacement.name, replacement(inner, base.longctx_state))


def unpatch_model(model: nn.Module) -> nn.Module:
    """Give the model back its own config object and attention; nothing happens to a model that is not patched.

    Raises:
        UnsupportedModelError: this is no Transformers model.
    """
    state = state_of(model)
    if state is None:
        return model
    whole = _patched_as(model)
    inner = unwrap(whole)
    base = language_model(whole)
    for one in state.configs:
        one.keep_edits()
        for holder in (whole, model):
            one.put_back(holder)
    for module in base.modules():
        module.__dict__.pop("longctx_stock", None)
        if module.__dict__.pop("longctx_plan", None) is not None:
            module.config = state.original
    for key, hook in list(base._forward_pre_hooks.items()):
        if isinstance(hook, BeforeForward):
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(base._forward_hooks.items()):
        if isinstance(hook, (GiveCacheBack, SeeHidden)):
            del base._forward_hooks[key]
            base._forward_hooks_with_kwargs.pop(key, None)
    for replacement in (*ON_MODEL, *ON_COMPILED):
        on_model = vars(inner).get(replacement.name)
        if isinstance(on_model, OnModel):  # somebody may have put another over it since
            on_model.remove()
    del base.longctx_state
    return model


@contextmanager
def patched(
    model: nn.Module | None = None,
    /,
    config: str | Path | dict | LongCtxConfig = "auto",
    *,
    heads: dict[str, Any] | None = None,
    stores: dict[str, Any] | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    kernel: str | None = None,
    **others: Any,
) -> Iterator[nn.Module]:
    """``with patched(model, config): ...``: as ``patch_model``, undone on exit, also after an exception.

    A model that was patched before gets its earlier config back, what ``report`` counted, and the attention
    implementation it was switched to.

    Raises:
        UnsupportedModelError: as ``patch_model``.
        ConfigError: as ``patch_model``.
    """
    given = {"heads": heads, "stores": stores, "prefill": prefill, "decode": decode, "kernel": kernel}
    model, sections = keywords("patched", model, given, others)
    with _patch_kept(model):
        yield patch_model(model, config, **sections)


@contextmanager
def unpatched(model: nn.Module) -> Iterator[nn.Module]:
    """``with unpatched(model): ...``: the model is dense inside, and gets its patch back on exit as with ``patched``.

    Raises:
        UnsupportedModelError: this is no Transformers model.
    """
    with _patch_kept(model):
        yield unpatch_model(model)


@contextmanager
def _patch_kept(model: nn.Module) -> Iterator[None]:
    """On exit the model is patched as it was, or not at all, also after an exception."""
    before = state_of(model)
    whole = _patched_as(model)
    attention = None if before is None else language_model(model).config._attn_implementation
    try:
        yield
    finally:
        if before is None:
            unpatch_model(model)
        else:
            _apply(whole, before.config, _family_of(whole))
            state_of(model).go_on_from(before)
            language_model(model).config._attn_implementation = attention


def _patched_as(model: nn.Module) -> nn.Module:
    """The module that was patched, when ``model`` is a part of it; else ``model`` itself."""
    state = state_of(model)
    whole = None if state is None else state.patched
    return model if whole is None else whole
