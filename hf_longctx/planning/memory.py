"""What a context takes in memory, dense and patched, and the longest that fits: a calculation in bytes.

``bench memory`` and ``plan`` stand on it. Weights + KV cache + the working memory of a prefill. The KV cache is counted
slot by slot, spare room included, and ``bench memory --check`` allocates it for real: as ``generate`` makes it, or with
``max_tokens``, where it also holds what streaming heads remember to take tokens back. It is the most that the cache
takes: a store that evicts tokens when the prompt has ended is counted whole, and what it has left is said as well. The
working memory is what one layer's forward of one chunk of the prompt holds:

- what Transformers' own code makes, followed without memory (``activations``): in the attention, or outside of it,
  whichever needs more;
- dense: the masks that the type makes, and what its attention holds. From the second chunk on sdpa takes the mask once
  more in the dtype for every sequence and, with grouped query heads, copies of the keys and values for every query
  head. ``eager`` attention, which some types need, holds every score of chunk x context, several times;
- patched: in place of these, the queries, keys and results of a role's heads, or while a layer's buffer grows, its old
  one, at most as large as the new one.

On a CPU torch's profiler agrees with this (tests/planning), but for one thing that depends on the processor: with AMX,
sdpa holds the keys and values of all query heads once more in bf16. Kernels for GPUs may hold more as well.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..cache.break_even import first_where
from ..cache.plan import LayerPlan
from ..cache.stock_layers import stock_layers, tensors_of
from ..config.config import LongCtxConfig
from ..config.model import text_config
from ..config.words import check_word, wrong
from ..eviction.base import Score
from ..model.family import find_family
from ..model.modules import attention_modules, language_model
from ..model.patch import patch_model
from ..model.plans import make_plan
from ..stores.base import SLACK, Reserve
from ..stores.evicted import Evicted
from .activations import Activations, Subject, activations, masks
from .sizes import DTYPES, dtype_of

MOST = 1 << 40  # tokens: what fits more than this has no limit
UNKNOWN_LENGTH = (
    "how many tokens the model was made for is not known: model.max_position_embeddings of the config does not say it"
)
DENSE = "dense"
PATCHED = "patched"
RESERVED = "patched, max_tokens"
WAYS = (DENSE, PATCHED, RESERVED)


@dataclass(frozen=True)
class MemorySettings:
    """What is asked.

    Attributes:
        memory: bytes in all.
        dtype: word of ``sizes.DTYPES``, of weights, cache and activations.
        batch: rows of the same length.
        chunk: tokens of the prompt per forward (``prefill_chunk_size``); 0 for all of them.
        weights: bytes of the weights, None to count the parameters.
    """

    memory: int
    dtype: str = "bf16"
    batch: int = 1
    chunk: int = 4096
    weights: int | None = None

    def __post_init__(self) -> None:
        check_word(self.dtype, DTYPES, "dtype")
        for name, least in (("memory", 1), ("batch", 1), ("chunk", 0), ("weights", 0)):
            number = getattr(self, name)
            if (type(number) is not int or number < least) and not (name == "weights" and number is None):
                raise wrong(name, number, f"a whole number, at least {least}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Need:
    """Bytes that one way needs for a context of ``tokens`` tokens in each row.

    Attributes:
        kv: most that the cache takes.
        kv_left: what it takes once the prompt has ended, where tokens are evicted then.
    """

    tokens: int
    weights: int
    kv: int
    working: int
    kv_left: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.working

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MemoryModel:
    """A model without weights, a config for it, and what is to be counted of them.

    Attributes:
        model: on the ``meta`` device.
        dense: the Transformers config, of a multimodal model the whole.
        config: what to patch with. Its ``model`` section may say less than ``dense``, or more.
        made_for: tokens the model was made for; None where that is not known.
        notes: what is not known of it, in words.
    """

    name: str
    model: Any
    dense: Any
    settings: MemorySettings
    config: LongCtxConfig
    made_for: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> Any:
        """The Transformers config of what reads the text."""
        return text_config(self.dense)

    def patch(self) -> Any:
        """The model, patched with the config; errors as ``patch_model``."""
        return patch_model(self.model, {**self.config.to_dict(), "model": LongCtxConfig.describe(self.dense)})

    @cached_property
    def plans(self) -> tuple[LayerPlan, ...]:
        """The plan of every layer, as a patched model has it."""
        family = find_family(self.text.model_type)
        modules = attention_modules(language_model(self.model), family)
        modules = [module for module in modules if family.has_roles(self.text, module.layer_idx)]
        modules = [module for module in modules if family.has_roles(self.text, module.layer_idx)]
        return tuple(make_plan(module, self.config, family, self.text) for module in modules)

    @property
    def kv_heads(self) -> int:
        return self.plans[0].kv_heads

    @cached_property
    def head_dim(self) -> int:
        return LongCtxConfig.describe(self.dense)["head_dim"]

    @property
    def number(self) -> int:
        """Bytes of one number."""
        return dtype_of(self.settings.dtype).itemsize

    @cached_property
    def weights(self) -> int:
        if self.settings.weights is not None:
            return self.settings.weights
        return sum(parameter.numel() for parameter in self.model.parameters()) * self.number

    def need(self, way: str, tokens: int) -> Need:
        """What ``way`` needs for ``tokens`` tokens."""
        return Need(tokens, self.weights, self.kv(way, tokens), self._working(way, tokens), self.kv_left(way, tokens))

    def kv(self, way: str, tokens: int) -> int:
        """Most bytes of the cache of all sequences: a prompt that is evicted when it ends is whole until then.

        With several chunks a growing buffer may have less spare room.
        """
        held = sum(self.layer_bytes(plan, way, tokens) for plan in self.plans)
        return max(self._beside(tokens) + held, self.kv_left(way, tokens))

    def kv_left(self, way: str, tokens: int) -> int:
        """Bytes of the cache once a prompt of ``tokens`` tokens has ended."""
        return self._beside(tokens) + sum(self.layer_left(plan, way, tokens) for plan in self.plans)

    def _beside(self, tokens: int) -> int:
        """Bytes of the layers whose heads have no roles."""
        windowed = sum(self._windowed(tokens, window) for window in self.stock_windows.values())
        states = (tensor for layer in self.activations.states.values() for tensor in tensors_of(layer))
        return windowed * self.kv_heads * self._slot + sum(one.numel() * one.element_size() for one in states)

    @cached_property
    def stock_windows(self) -> dict[int, int]:
        """Layer index -> tokens of its window or chunk, of the layers that are not patched and have keys."""
        others = stock_layers(self.text, {plan.layer_idx for plan in self.plans})
        return {index: one.sliding_window for index, one in others.items() if hasattr(one, "sliding_window")}

    def layer_bytes(self, plan: LayerPlan, way: str, tokens: int) -> int:
        """Most bytes of all KV heads of a layer while a prompt is read, in all rows."""
        if way == DENSE or not any(role.store.by_data for role in plan.filled):
            return self.layer_left(plan, way, tokens)
        form = (
            tokens,
            self.head_dim,
            self.number,
            _reserve(way, tokens),
            self.chunk(tokens),
            self.group,
            *self._rank(plan),
        )
        held = sum(len(role.heads.kv_heads) * role.store.prompt_nbytes(*form).device for role in plan.filled)
        return held * self.settings.batch

    def layer_left(self, plan: LayerPlan, way: str, tokens: int) -> int:
        """Bytes of all KV heads of a layer once a prompt of ``tokens`` tokens has ended, in all rows."""
        if way == DENSE:
            longest = tokens if plan.window is None else self._windowed(tokens, plan.window)
            return plan.kv_heads * longest * self._slot
        reserve = _reserve(way, tokens)
        form = (self.head_dim, self.number)
        held = 0
        for role in plan.filled:
            store = role.store.in_layer(*self._rank(plan), tokens)
            index = role.decode.index_bytes(store.selectable(tokens), *form, reserve.max_tokens)
            known = store.known_nbytes(tokens, *form, self.group)
            held += len(role.heads.kv_heads) * (store.nbytes(tokens, *form, reserve).device + known + index)
        return held * self.settings.batch

    def _rank(self, plan: LayerPlan) -> tuple[int, int]:
        """(which, of how many) of the layers with a store of which tokens are evicted."""
        return sum(layer < plan.layer_idx for layer in self._evicting), len(self._evicting)

    @cached_property
    def _evicting(self) -> tuple[int, ...]:
        return tuple(plan.layer_idx for plan in self.plans if any(role.store.by_data for role in plan.filled))

    @property
    def evicts(self) -> bool:
        """Whether tokens leave the cache when a prompt has ended."""
        return bool(self._evicting)

    @property
    def rules(self) -> list[Score]:
        """The scores by which tokens are evicted, one per layer and role."""
        stores = [role.store for plan in self.plans for role in plan.filled]
        return [store.rule for store in stores if isinstance(store, Evicted)]

    @property
    def ends(self) -> str:
        """When tokens have left, in words."""
        asked = any(rule.moment == "call" for rule in self.rules)
        return "Once cache.compress() was called" if asked else "Once it has ended"

    @property
    def exact(self) -> bool:
        """Whether the bytes of the cache are known; else they are at most those."""
        return all(role.store.counted for plan in self.plans for role in plan.filled)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.text.num_attention_heads // self.kv_heads

    def host(self, tokens: int) -> int:
        """Bytes that stores keep in host memory by choice, in all rows; not in ``kv``."""
        form = (tokens, self.head_dim, self.number)
        roles = [role for plan in self.plans for role in plan.filled]
        return sum(len(role.heads.kv_heads) * role.store.nbytes(*form).host for role in roles) * self.settings.batch

    @property
    def _slot(self) -> int:
        """Bytes of one slot of one KV head, in all rows."""
        return 2 * self.head_dim * self.number * self.settings.batch

    def chunk(self, tokens: int) -> int:
        """Tokens per forward of a prompt."""
        return min(tokens, self.settings.chunk or tokens)

    def _windowed(self, tokens: int, window: int) -> int:
        """Most slots of a dense sliding layer: what it kept before a chunk, and the chunk, of which it keeps a view."""
        chunk = self.chunk(tokens)
        full = max(0, tokens // chunk - 1) * chunk
        last = (tokens - 1) // chunk * chunk
        return max(min(past, window - 1) + min(chunk, tokens - past) for past in (0, full, last))

    @cached_property
    def _subject(self) -> Subject:
        return Subject.of(self.dense, dtype_of(self.settings.dtype), self.settings.batch)

    @cached_property
    def activations(self) -> Activations:
        """What its layers hold while a chunk is read.

        Raises:
            UnsupportedModelError: that cannot be calculated.
        """
        return activations(self._subject)

    def _working(self, way: str, tokens: int) -> int:
        chunk = self.chunk(tokens)
        windows = self._windows if way == DENSE else set(self.stock_windows.values())
        masked, made = self._masks(way, chunk, tokens)
        stock = [self._dense_attention(chunk, tokens, window) for window in windows]
        after = max((held for _, held in stock), default=0)
        inside = max((held for held, _ in stock), default=0)
        outside = self.activations.outside(chunk) + masked + after
        attention = self.activations.attention(chunk) + masked
        if way == DENSE:
            return max(made, outside, attention + inside)
        shared = [role for plan in self.plans if len(plan.filled) > 1 for role in plan.filled]
        keys = max((len(role.heads.kv_heads) for role in shared), default=0)
        parts = (2 * self.text.num_attention_heads + keys) * chunk * self._slot // 2
        grown = max(self.layer_bytes(plan, way, tokens) for plan in self.plans) if way == PATCHED else 0
        return max(outside, attention + max(inside, parts), grown)

    def _masks(self, way: str, chunk: int, tokens: int) -> tuple[int, int]:
        """(bytes of the masks of a forward, most while they are made); patched, of layers left to Transformers."""
        if way == DENSE:
            return masks(self._subject, chunk, tokens)
        windows = set(self.stock_windows.values())
        return sum(chunk * self._windowed(tokens, window) for window in windows), 0

    @cached_property
    def _windows(self) -> set[int | None]:
        return {*(plan.window for plan in self.plans), *self.stock_windows.values()}

    def _dense_attention(self, chunk: int, tokens: int, window: int | None) -> tuple[int, int]:
        """Bytes that the dense attention of a layer holds beside its result, and that it leaves to the layer."""
        keys = tokens if window is None else self._windowed(tokens, window)
        found = self.activations
        if found.eager is not None:
            return found.eager(chunk, keys), found.weights(chunk, keys)
        masked = chunk < tokens or (window is not None and tokens >= window)
        if found.implementation != "sdpa" or not masked:
            return 0, 0
        heads = self.text.num_attention_heads
        copies = keys * heads * self._slot if heads > self.kv_heads else 0
        return copies + chunk * keys * self.number * self.settings.batch, 0


def _reserve(way: str, tokens: int) -> Reserve:
    return Reserve(tokens, SLACK) if way == RESERVED else Reserve(None, 0)


def longest(memory_model: MemoryModel, way: str) -> int | None:
    """Tokens of the longest context whose need fits into the memory; 0 for none, None where there is no limit."""

    def too_much(tokens: int) -> bool:
        return memory_model.need(way, tokens).total > memory_model.settings.memory

    if not too_much(MOST):
        return None
    low = 0
    high = 1
    while not too_much(high):
        low = high
        high = 2 * high
    return first_where(too_much, low, high) - 1
