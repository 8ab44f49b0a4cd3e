"""patch_model, unpatch_model, patched, unpatched, observe: switch one model over, and back."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..cache.plan import LayerPlan, PrefillPlan
from ..config.config import LongCtxConfig
from ..config.find import resolve
from ..config.head_map import slice_roles
from ..errors import UnsupportedModelError
from ..kernels import base as kernels
from ..layout.blocks import BlockList
from ..prefill.base import PatternSpec
from ..stores.sink_recent import SinkRecent
from .attention import NAME, register
from .contract import check_transformers
from .family import Family, families, find_family
from .hooks import ON_MODEL, BeforeForward, OnModel, observers
from .overrides import keywords
from .state import PatchState

UNMEASURED = "the heads of this model were not measured, so all of them keep every token and no memory is saved"

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
        model: a loaded Llama, Mistral, Qwen2 or Qwen3 model, also inside a PEFT wrapper or under tensor parallel.
        config: "auto" (the model's own ``config.longctx``, else the shipped config made for it), a shipped name or a
            hub id that a shipped config lists (both in any case), the path of a YAML, a dict, or a ``LongCtxConfig``.
        heads, stores, prefill, decode, kernel: sections merged into the config, e.g.
            ``heads={"retrieval_fraction": 0.25}``. None: as in the config.
        others: ``model={...}``, the section that says which model the config fits, merged as well.
            ``model={"fingerprint": {"vocab_size": None}}`` stops checking the vocabulary.

    Raises:
        UnsupportedModelError: the family is not in ``patches/``.
        ConfigError: no config fits, the config was made for another model, or an unknown keyword.
        UnsupportedModeError: the config names a kernel that cannot run its prefill pattern.

    Papers: head roles, DuoAttention arXiv:2410.10819; sinks, StreamingLLM arXiv:2309.17453.
    """
    given = {"heads": heads, "stores": stores, "prefill": prefill, "decode": decode, "kernel": kernel}
    model, sections = keywords("patch_model", model, given, others)
    hf_config = unwrap(model).base_model.config
    find_family(hf_config.model_type)
    if config == "auto" and (state := state_of(model)) and hf_config.longctx == state.config.to_dict():
        config = state.config  # given in this process: it may name paths, which a config that came with a model may not
    settings = resolve(config, hf_config, getattr(hf_config, "_name_or_path", None), sections)
    _apply(_patched_as(model), settings)
    if UNMEASURED in state_of(model).log.notes:
        logger.warning("%s: hf-longctx identify measures them", UNMEASURED)
    if (scaled := settings.model.rope_note(hf_config)) is not None:
        logger.warning("%s", scaled)
    return model


def _apply(model: nn.Module, settings: LongCtxConfig) -> None:
    """Patch with a config that fits: all plans are made before anything is changed."""
    inner = unwrap(model)
    base = inner.base_model
    family = find_family(base.config.model_type)
    modules = attention_modules(base, family)
    check_transformers(inner, base, attention_copies(modules[0], family)[0])
    plans = [make_plan(module, settings, family, base.config) for module in modules]
    if any(role.prefill is not None for plan in plans for role in plan.roles):
        kernels.require(settings.kernel, BlockList, "this config's prefill pattern")

    unpatch_model(model)
    register()
    original = base.config
    private = copy.deepcopy(original)
    private.longctx = settings.to_dict()
    private._attn_implementation = NAME
    _swap_config(model, original, private)
    for module, plan in zip(modules, plans, strict=True):
        for part in attention_copies(module, family):
            part.longctx_plan, part.config = plan, private
    snapshot = copy.deepcopy(vars(private))
    base.longctx_state = PatchState(settings, original, snapshot, tuple(plans), weakref.ref(model))
    if settings.heads.source and settings.heads.confidence == "none" and "S" not in "".join(settings.roles()):
        base.longctx_state.note(UNMEASURED)
    if (scaled := settings.model.rope_note(original)) is not None:
        base.longctx_state.note(scaled)
    base.register_forward_pre_hook(BeforeForward(base.longctx_state), with_kwargs=True)
    for replacement in ON_MODEL:
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
    base = inner.base_model
    state.keep_edits(base.config)
    for holder in (whole, model):
        _swap_config(holder, base.config, state.original)
    for module in base.modules():
        if module.__dict__.pop("longctx_plan", None) is not None:
            module.config = state.original
    for key, hook in list(base._forward_pre_hooks.items()):
        if isinstance(hook, BeforeForward):
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    for replacement in ON_MODEL:
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
    before, whole = state_of(model), _patched_as(model)
    attention = None if before is None else unwrap(model).base_model.config._attn_implementation
    try:
        yield
    finally:
        if before is None:
            unpatch_model(model)
        else:
            _apply(whole, before.config)
            state_of(model).go_on_from(before)
            unwrap(model).base_model.config._attn_implementation = attention


@contextmanager
def observe(model: nn.Module, fn: Callable) -> Iterator[nn.Module]:
    """Show every attention call of a patched model to ``fn``, on this thread, until the block ends.

    ``fn(layer_idx, q, k, v, scaling, rows, compute)`` gets the rotated q ``[B, H, T, D]`` and all keys and values
    ``[B, H_kv, S, D]``. It returns the layer's output ``[B, H, T, D]``, built from ``compute("retrieval")`` and
    ``compute("streaming")`` (every head computed by the rule of that role's store, differentiable; prefill patterns do
    not run there), or None to leave it alone. Inside, the model makes a DynamicCache for itself, which keeps every
    token. Where it is given a ``LongCtxCache``, k and v are the same tuple, one
    `hf_longctx.model.observed.CachedRole` per role with heads: ``sequence(i)`` gives the keys and values that are
    cached and their row positions, ``dropped(i)`` the number of tokens that are gone, and ``compute(role)`` is refused
    in layers that have heads of the other role.

    Raises:
        UnsupportedModelError: the model is not patched.
    """
    if state_of(model) is None:
        raise UnsupportedModelError("observe needs a patched model: call patch_model(model) first.")
    token = observers.set({**observers.get(), id(unwrap(model).base_model): fn})
    try:
        yield model
    finally:
        observers.reset(token)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside PEFT and torch.compile wrappers.

    Raises:
        UnsupportedModelError: there is none.
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no Transformers model; supported model types: {', '.join(families())}."
        )
    return inner


def state_of(model: nn.Module) -> PatchState | None:
    """What a patched model remembers; None for a model that is not patched."""
    return getattr(unwrap(model).base_model, "longctx_state", None)


def attention_modules(base: nn.Module, family: Family) -> list[nn.Module]:
    """The attention modules of the base model, by layer index."""
    layers = getattr(base, family.layers, None)
    modules = [getattr(layer, family.attention) for layer in layers or () if hasattr(layer, family.attention)]
    wrapper = next((type(module).__name__ for module in modules if not hasattr(module, "layer_idx")), None)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"'{family.layers}[i].{family.attention}' is a {wrapper}, which has no layer_idx: something was put around "
            "the attention, as PEFT's adaption prompt does. Call patch_model first, and wrap the patched model."
        )
    if not modules:
        raise UnsupportedModelError(
            f"{type(base).__name__} has no '{family.layers}[i].{family.attention}', where {family.model_type} models "
            "keep their attention."
        )
    return modules


def attention_copies(module: nn.Module, family: Family) -> list[nn.Module]:
    """The attention module itself, or the copies inside PEFT's modules_to_save, each of which has its own config.

    Raises:
        UnsupportedModelError: it has no projection of the name that the family says.
    """
    found = [part for part in module.modules() if family.key_projection in part._modules]
    if not found:
        names = ", ".join(module._modules) or "none"
        raise UnsupportedModelError(
            f"{type(module).__name__} has no '{family.key_projection}'; it has {names}. Set key_projection in "
            f"patches/{family.model_type}.py to the one that makes the keys."
        )
    return found


def make_plan(module: nn.Module, settings: LongCtxConfig, family: Family, hf_config: Any) -> LayerPlan:
    """The plan of one attention module: the roles of the KV heads that this process holds, stores and patterns."""
    layer = module.layer_idx
    roles = settings.roles()[layer]
    rank, size = tensor_parallel(module, family, len(roles))
    if size > 1:
        roles = slice_roles(roles, rank, size)
    stores = {"retrieval": settings.stores.retrieval, "streaming": settings.stores.streaming}
    window = family.window(hf_config, layer)
    if window is None:
        patterns = query_patterns(settings, layer)
        step = len(patterns) // size
        prefill = make_prefill(settings, roles, patterns[rank * step : (rank + 1) * step])
        more = {"prefill": prefill, "decode": settings.decode.retrieval}
    else:
        roles, more = "S" * len(roles), {"window": window}
        stores = dict.fromkeys(stores, SinkRecent(sink=0, recent=window))
    return LayerPlan.of(layer, roles, stores, settings.kernel, scores=family.scores, **more)


def query_patterns(settings: LongCtxConfig, layer: int) -> tuple[PatternSpec, ...]:
    """The prefill pattern of every query head of a layer, on all processes together."""
    table = settings.prefill.table
    if table is None:
        return (settings.prefill.retrieval,) * settings.model.num_attention_heads
    return tuple(table.budgets[index] for index in table.map[layer])


def make_prefill(settings: LongCtxConfig, roles: str, patterns: tuple[PatternSpec, ...]) -> PrefillPlan | None:
    """The prefill plan of a layer's (or slice's) retrieval heads; None where all of them read densely."""
    group = len(patterns) // len(roles)
    kept = tuple(spec for head, spec in enumerate(patterns) if roles[head // group] == "R")
    if all(spec.reads_all for spec in kept):
        return None
    return PrefillPlan(kept, settings.prefill.min_tokens, settings.prefill.share_groups)


def tensor_parallel(module: nn.Module, family: Family, kv_heads: int) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group over which this attention's KV heads are spread; (0, 1) for none."""
    projection = getattr(module, family.key_projection)
    weight = getattr(projection, "weight", None)
    # Transformers keeps the global shape in a DTensor, or (5.2 to 5.12) the local one and the mesh on the projection.
    mesh = getattr(weight, "device_mesh", None) or getattr(projection, "_hf_device_mesh", None)
    if mesh is None:
        return 0, 1
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    size = kv_heads * module.head_dim // local.shape[0]
    if size == 1:
        return 0, 1
    if "tp" in (mesh.mesh_dim_names or ()):
        mesh = mesh["tp"]
    return mesh.get_local_rank(), size


def _patched_as(model: nn.Module) -> nn.Module:
    """The module that was patched, when ``model`` is a part of it; else ``model`` itself."""
    state = state_of(model)
    whole = None if state is None else state.patched
    return model if whole is None else whole


def _swap_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
