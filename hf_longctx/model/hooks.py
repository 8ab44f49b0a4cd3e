"""The seams of a patched model: what it does before every forward, and what ``generate`` and its batches start with.

All are small picklable objects. Every refusal happens here, before the first layer writes into a cache.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ..cache.cache import LongCtxCache
from ..cache.eviction import tell_prompt
from ..cache.paged.kv import StepCache
from ..cache.plan import differing
from ..cache.seam import CACHE, rename_cache
from ..errors import CacheError, UnsupportedModeError
from ..layout.dtypes import autocast_on
from ..layout.forward import Forward
from ..layout.mask_errors import Known
from ..layout.rows import read_mask
from .as_stock import padding_of
from .attention import FORWARD, NAME, register
from .batched import KEPT, check_batching, check_pads
from .compiled import traced_call
from .drafts import DraftsApart
from .graphs import refuse_graphs
from .modules import language_model
from .positions import positions_ahead, refuse_other_prompt, refuse_positions
from .refusals import PACKED, refuse_call, refuse_eviction, refuse_selection
from .refused_generation import DENSE_MEMORY, refuse_generate
from .rotary import check_rotary
from .state import PatchState

# base model id -> observer; a context variable, so that threads that share a model do not see each other's.
observers: ContextVar[Mapping[int, Any]] = ContextVar("hf_longctx_observers", default=MappingProxyType({}))

# Whether generate() runs a loop that is not Transformers' own, on this thread.
custom_loop: ContextVar[bool] = ContextVar("hf_longctx_custom_loop", default=False)

# Generation modes that never take a token back.
FORWARD_ONLY = ("greedy_search", "sample", "beam_search", "beam_sample")


# What continuous batching gives the layers beside the cache: lists of indexes, which pages of single heads do not use.
OF_BATCHING = (
    *PACKED,
    *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),
)


class BeforeForward:
    """Forward pre-hook of the base model: checks the call, makes the cache, hands ``Rows`` to the layers."""

    def __init__(self, state: PatchState):
        self.state = state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        register()

    def __call__(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if torch.compiler.is_dynamo_compiling() and not args and (traced := traced_call(base, kwargs)) is not None:
            return args, traced
        named = _names(base, len(args))
        given = {**dict(zip(named, args, strict=True)), **kwargs}
        rename_cache(given)
        if not self.prepare(base, given):
            return None
        return tuple(given.pop(name) for name in named), given

    def prepare(self, base: nn.Module, given: dict) -> bool:
        """Check ``given`` and add what the layers need; False where the model runs as it would without a patch."""
        config = base.config
        cache = given.get(CACHE)
        if config._attn_implementation != NAME:
            self._refuse_dense(cache, config._attn_implementation)
            return False
        refuse_graphs()
        if isinstance(cache, StepCache):
            self._begin_step(given, cache)
            return True
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if not isinstance(inputs, Tensor):
            return False  # the model's own error says which inputs it needs
        refuse_call(base, given)
        refuse_eviction(self.state.plans, base, cache, id(base) in observers.get())
        cache = self._cache(base, given, config)
        if isinstance(cache, LongCtxCache):
            self._check_cache(base, cache)
        past = cache.get_seq_length() if cache is not None else 0
        mask = padding_of(given.get("attention_mask"))
        ids = given.get("input_ids")
        known = partial(Known.by, self.state.patched, config, cache)
        rows = read_mask(mask, inputs.shape[0], past, inputs.shape[1], ids=ids, known=known)
        staggered = getattr(cache, "staggered", False)
        positions = given.get("position_ids")
        refuse_positions(positions, rows, staggered)
        if note := check_rotary(config, rows):
            self.state.note(note)
        refuse_selection(self.state.plans, rows, cache, inputs.device)
        observer = observers.get().get(id(base))
        steps = rows.new == 1 and not rows.padded and observer is None and not autocast_on(inputs)
        ours = isinstance(cache, LongCtxCache)
        forward = Forward(rows, self.state.log, observer, ours, steps, ours and cache.reads_prompt(rows))
        if isinstance(cache, LongCtxCache):
            if past and cache is not self.state.last_cache:
                refuse_other_prompt(positions, rows, cache.ahead)
            cache.begin(forward, ids)
            cache.ahead = positions_ahead(positions, rows, cache.ahead)
            if staggered and positions is None:  # the model would count pads
                given["position_ids"] = rows.positions(inputs.device)
        elif cache is not None:
            self.state.note(f"dense memory: a {type(cache).__name__} kept every token of every head")
        self.state.saw(rows, cache)
        given[CACHE], given[FORWARD] = cache, forward
        return True

    def _begin_step(self, given: dict, cache: StepCache) -> None:
        """A forward of continuous batching: of its requests the layers are told by the cache alone."""
        for name in OF_BATCHING:
            given.pop(name, None)
        cache.begin(self.state.log)
        self.state.forwards += 1

    def _cache(self, base: nn.Module, given: dict, config) -> Cache | None:
        cache = given.get(CACHE)
        use_cache = given.get("use_cache")
        use_cache = config.use_cache if use_cache is None else use_cache
        if cache is not None or not use_cache or base.training:
            return cache
        return DynamicCache(config=config) if id(base) in observers.get() else LongCtxCache(base)

    def _refuse_dense(self, cache: Any, implementation: str) -> None:
        if isinstance(cache, LongCtxCache):
            raise UnsupportedModeError(
                f"the model was switched to attention '{implementation}' and runs dense, so it cannot read a "
                f"LongCtxCache. Start with a new cache, or switch back with model.set_attn_implementation('{NAME}')."
            )
        self.state.runs_dense(implementation)

    def _check_cache(self, base: nn.Module, cache: LongCtxCache) -> None:
        if cache.plans != (plans := self.state.plans[: len(cache.plans)]):
            differs = differing(cache.plans, plans)
            if differs != ["decode"]:
                raise CacheError(
                    "this LongCtxCache was made for another model or another config (other "
                    f"{', '.join(differs) or 'number of layers'}). Start with a new cache after patch_model."
                )
            cache.select_by(plans)
        cache.check()
        cache.model = self.state.base = weakref.ref(base)


def _names(base: nn.Module, positional: int) -> tuple[str, ...]:
    """What the base model's forward calls its first ``positional`` arguments; Transformers itself passes none."""
    return tuple(inspect.signature(type(base).forward).parameters)[1 : 1 + positional] if positional else ()


def _hands_back(generation_config: Any, given: tuple) -> bool:
    """Whether somebody may take tokens back from the cache that generate() makes: its caller, its drafts, another loop.

    ``given`` are the other arguments of ``_prepare_cache_for_generation``, the generation mode among them.
    """
    kept = generation_config.return_dict_in_generate or getattr(generation_config, "is_assistant", False)
    return bool(kept or custom_loop.get()) or not any(getattr(one, "value", None) in FORWARD_ONLY for one in given)


class OnModel:
    """Replaces a method of one model.

    Attributes:
        name: of the method.
        before: what stood on the model in place of the class's own, or None (Transformers itself puts a ``generate``
            there for a checkpoint that brings one).
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, state: PatchState):
        self.model = model
        self.state = state
        self.before: Callable | None = vars(model).get(self.name)

    @property
    def original(self) -> Callable:
        """What it replaces, bound to the model."""
        return self.before or getattr(type(self.model), self.name).__get__(self.model)

    def remove(self) -> None:
        """Put back what was there before."""
        delattr(self.model, self.name)
        if self.before is not None:
            setattr(self.model, self.name, self.before)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def __name__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<{self.name} of a patched {type(self.model).__name__}>"

    @property
    def dense(self) -> bool:
        """Whether the model was switched to another attention since it was patched."""
        return language_model(self.model).config._attn_implementation != NAME


class Generate(OnModel):
    """Replaces ``generate``: a cache is taken under both of its names."""

    name = "generate"

    def __call__(self, *args, **kwargs) -> Any:
        rename_cache(kwargs)
        if kwargs.get("cache_implementation") == "paged" and not self.dense:
            check_pads(kwargs.get("attention_mask"))
        custom = self.before is not None or kwargs.get("custom_generate") is not None
        token = custom_loop.set(custom or custom_loop.get())
        try:
            return self.original(*args, **kwargs)
        finally:
            custom_loop.reset(token)


class StartBatching(OnModel):
    """Replaces ``init_continuous_batching``, whose manager would switch the model to another attention."""

    name = "init_continuous_batching"

    def __call__(self, *args, **kwargs) -> Any:
        if self.dense:
            return self.original(*args, **kwargs)
        check_batching(self.state.plans, id(language_model(self.model)) in observers.get())
        from .batching import start  # of Transformers' continuous batching, which is imported where it is asked for

        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        return start(self.model, self.state, **given)

    def remove(self) -> None:
        """A manager that was kept for later has a cache that only the patched model reads."""
        if KEPT in vars(self.model):
            self.model.destroy_cached_continuous_batching_manager()
        super().remove()


class SetAttention(OnModel):
    """Replaces ``set_attn_implementation``, which would give our word to the vision part of the model as well."""

    name = "set_attn_implementation"

    def __call__(self, attn_implementation: Any, *args, **kwargs) -> None:
        if attn_implementation != NAME:
            return self.original(attn_implementation, *args, **kwargs)
        language_model(self.model).config._attn_implementation = NAME
        return None


class PrepareCache(OnModel):
    """Replaces ``_prepare_cache_for_generation``: generate() starts with a ``LongCtxCache``."""

    name = "_prepare_cache_for_generation"

    def __call__(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        model = self.model
        asked = generation_config.cache_implementation
        cache = model_kwargs.get(CACHE)
        no_cache = generation_config.use_cache is False or id(language_model(model)) in observers.get()
        if not self.dense:
            refuse_generate(model, self.state.plans, cache, generation_config, (*args, *kwargs.values()))
        if self.dense or cache is not None or no_cache or asked in DENSE_MEMORY:
            return self.original(generation_config, model_kwargs, *args, **kwargs)
        rollback = _hands_back(generation_config, (*args, *kwargs.values()))
        model_kwargs[CACHE] = LongCtxCache(model, rollback=rollback)
        return None


class Prefill(OnModel):
    """Replaces ``_prefill``, in which generate() reads its prompt: the cache is told what is one, and where it ends."""

    name = "_prefill"

    def __call__(self, input_ids: Tensor, generation_config, model_kwargs: dict, *args, **kwargs) -> Any:
        given = (input_ids, generation_config, model_kwargs)
        cache = model_kwargs.get(CACHE)
        # An assistant is asked for drafts time after time, in a generate() of its own each.
        again = getattr(generation_config, "is_assistant", False) and cache is not None and cache.get_seq_length()
        if self.dense or again or not isinstance(cache, LongCtxCache):
            return self.original(*given, *args, **kwargs)
        tell_prompt(cache, ended=False)
        try:
            return self.original(*given, *args, **kwargs)
        finally:
            tell_prompt(cache, ended=True)


class MakeDrafts(OnModel):
    """Replaces ``_get_candidate_generator``: drafts are never read as the end of a prompt."""

    name = "_get_candidate_generator"

    def __call__(self, *args, **kwargs) -> Any:
        drafts = self.original(*args, **kwargs)
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        if isinstance(cache := given["model_kwargs"].get(CACHE), LongCtxCache):
            cache.prompt_end = given["input_ids"].shape[1]
        if not self.dense and any(plan.tells_prompts for plan in self.state.plans):
            drafts.get_candidates = DraftsApart(drafts)
        return drafts


ON_MODEL: tuple[type[OnModel], ...] = (Generate, StartBatching, SetAttention, PrepareCache, Prefill, MakeDrafts)
