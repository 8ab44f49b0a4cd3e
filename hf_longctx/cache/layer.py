"""One layer of a LongCtxCache: a store per role."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..decode._selection import Selection
from ..errors import CacheError
from ..io.tensor_file import DTYPES
from ..kernels import base as kernels
from ..layout.dtypes import autocast_on, needs_grad
from ..layout.forward import Forward
from ..layout.rows import Rows
from ..stores._evicted import EvictedStore
from ..stores._saved import SavedStore, SavedTensors, Told
from ..stores.base import SLACK, Store
from . import selections
from .dense_members import DenseLayerMembers
from .finite import check_forward, every_forward
from .layer_kv import LayerKV, Pending
from .plan import LayerPlan

SAVED = ("seen", "batch", "head_dim", "dense_bytes_per_token", "autocast")  # of a layer, in its file


class LongCtxLayer(DenseLayerMembers, CacheLayerMixin):
    """The stores of one layer, one per role."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False
    step: Any = None  # of the kernel that writes and reads a token at once, see kernels.base; False: there is none

    def __init__(self, plan: LayerPlan, max_tokens: int | None = None, slack: int = SLACK):
        self.plan = plan
        self.max_tokens = max_tokens
        self.is_initialized = False
        self.seen = 0
        self.whole = True  # False while stores are written, and for good when that was interrupted
        self.stores: list[Store] = [role.store.new(role.heads, max_tokens) for role in plan.filled]
        for store in self.stores:
            store.slack = slack
        for store in self.evicting:
            store.known.rotation, store.known.layer = plan.role(store.heads.role).rotation, plan.layer_idx
        self.select_by(plan)
        self.dense_bytes_per_token = 0
        self.checked = every_forward()
        self.autocast = False

    def select_by(self, plan: LayerPlan) -> None:
        """Select as ``plan`` says, with indexes that are still to be built; in all else it is the layer's own."""
        self.plan = plan
        self.selections = [
            Selection(role.decode, plan.word, self.max_tokens) if role.selects else None for role in plan.filled
        ]
        self.step = None

    @property
    def evicting(self) -> list[EvictedStore]:
        """The stores of which tokens are evicted by score."""
        return [store for store in self.stores if isinstance(store, EvictedStore)]

    def store_of(self, role: str) -> Store | None:
        """The store of ``retrieval`` or ``streaming`` heads; None where there are none."""
        return next((store for store in self.stores if store.heads.role == role), None)

    def end_prompt(self, rows: Rows) -> None:
        """A prompt has ended; ``rows`` are all that was seen."""
        for store in self.stores:
            if store.spec.by_data:
                self.whole = False
                store.end_prompt(rows)
                self.whole = True

    def forget_choices(self, store: Store) -> None:
        """Of a store that has other tokens now, the index and the choices of its selection."""
        if (selection := self.selections[self.stores.index(store)]) is not None:
            selection.reset()
        self.step = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "step": None}  # a copy lays out its own

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        per_head = (
            key_states.shape[-1] * key_states.element_size() + value_states.shape[-1] * value_states.element_size()
        )
        self.batch = key_states.shape[0]
        self.head_dim = key_states.shape[3]
        self.dtype, self.device, self.autocast = key_states.dtype, key_states.device, autocast_on(key_states)
        self.dense_bytes_per_token = per_head * key_states.shape[1]
        self.is_initialized = True
        self.step = None

    def take_step(self, k: Tensor, v: Tensor, forward: Forward) -> LayerKV | None:
        """As `update`, of one token of each sequence, which is written together with its attention.

        None where that is not possible, and nothing was changed that the `update` of the same forward would not.
        """
        if torch.compiler.is_compiling():
            return None
        if self.step is None and self.is_initialized:
            self.step = self._new_step()
        if not self.step:
            return None
        held, kind = (self.batch, self.plan.kv_heads, 1, self.head_dim), (self.dtype, self.device)
        if k.shape != held or (k.dtype, k.device) != kind or (v.dtype, v.device) != kind:
            return None
        if needs_grad(k, v) or self.checked or not self._steps_select(forward.rows):
            return None
        places = []
        for store in self.stores:
            places.append(store.place(forward.rows))
            if places[-1] is None:
                return None
        return LayerKV(None, forward, Pending(self, k, v, places, forward.rows.total))

    def _steps_select(self, rows: Rows) -> bool:
        """Whether what a token reads of each store is all of it, or a list that is chosen for all sequences at once."""
        plans = (role.decode for role in self.plan.filled if role.selecting(rows))
        return not any(spec.estimates or (spec.by_sequence and rows.batch > 1) for spec in plans)

    def _new_step(self) -> Any:
        if self.autocast or self.plan.scores or self.plan.kernel == "stock":
            return False
        if not all(store.has_place() for store in self.stores):
            return False
        heads = [store.heads for store in self.stores]
        return kernels.new_step(self.plan.word, self.device, self.dtype, self.head_dim, heads) or False

    def update(self, key_states: Tensor, value_states: Tensor, forward: Forward) -> LayerKV:
        """Keep k, v ``[B, H_kv, T, D]`` of this forward; return what its queries read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, kv_heads, new, head_dim = key_states.shape
        rows = forward.rows
        # A prompt read under autocast may be continued without, and the reverse: the cache stays in its dtype.
        dtype = key_states.dtype if autocast_on(key_states) == self.autocast else self.dtype
        got = (batch, kv_heads, head_dim, dtype, key_states.device)
        held = (self.batch, self.plan.kv_heads, self.head_dim, self.dtype, self.device)
        if got != held or not new:
            raise CacheError(
                f"layer {self.plan.layer_idx} got {new} tokens of {_described(*got)}, but this cache holds "
                f"{_described(*held)}. It is as it was; bring tokens of that kind, or use a new cache."
            )
        if self.checked:
            check_forward(self.plan.layer_idx, key_states, value_states)
        for store in self.stores:
            store.prepare(key_states, value_states, rows)
        self.whole = False
        parts = [store.append(key_states, value_states, rows) for store in self.stores]
        for part, selection in zip(parts, self.selections, strict=True):
            part.selection = selection
            if not forward.prompt and part.spec.every is None:
                part.attended = None  # of decoded tokens, drafts among them
        self.seen = rows.total
        self.whole = True
        if new > 1:  # a prompt that is read in one forward reads no page of its own
            forward.log.notes.update(store.note for store in self.stores if store.note)
        return LayerKV(parts, forward)

    def get_seq_length(self) -> int:
        """Tokens seen (not kept), pads included."""
        return self.seen

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.seen + _length(query_length), 0

    def get_max_length(self) -> int:
        """Tokens the layer can hold, -1 for no limit."""
        return -1 if self.max_tokens is None else self.max_tokens

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Remember what windows drop from now on, so that `SLACK` tokens can be taken back."""
        for store in self.stores:
            store.slack = SLACK

    @property
    def oldest_crop(self) -> int:
        """Fewest tokens that this layer can still be cropped to."""
        return max(store.oldest_crop(self.seen) for store in self.stores)

    def stagger(self, rows: Rows, pads: Sequence[int]) -> None:
        self.whole = False
        for store in self.stores:
            store.stagger(rows, pads)
        for selection in self.chosen:
            selection.part_ways(rows.batch)
            selection.crop(replace(rows, starts=tuple(pads)), rows.total)
        self.whole = True

    def crop_to(self, rows: Rows, target: int) -> None:
        if target < self.seen:
            self.whole = False
            for store in self.stores:
                store.crop(rows, target)
            for store, selection in zip(self.stores, self.selections, strict=True):
                if selection is not None:
                    held = store.geometry(rows)
                    selection.crop(held, target - rows.total + held.total)
            self.seen = target
            self.whole = True

    def map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        self.whole = False
        for store in self.stores:
            store.map_rows(change)
        for selection in self.chosen:
            selection.map_rows(change, self.batch)
        self.batch = batch
        self.whole = True

    def fork(self) -> LongCtxLayer:
        other = copy.copy(self)
        other.stores = [store.fork() for store in self.stores]
        other.selections = [None if one is None else one.fork() for one in self.selections]
        other.step = None
        return other

    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        for selection in self.chosen:
            selection.reset()
        self.seen = 0
        self.is_initialized = False
        self.whole = True

    def tensors(self) -> Iterable[Tensor]:
        for store in self.stores:
            yield from store.tensors()
        for selection in self.chosen:
            yield from selection.tensors()

    def waiting(self) -> Iterator[tuple[Selection, Store]]:
        """The selections that are to be settled, each with its store."""
        for store, selection in zip(self.stores, self.selections, strict=True):
            if selection is not None and selection.waits:
                yield selection, store

    @property
    def remembering(self) -> list[Selection]:
        """The selection of which a file has something: at most one, that of the retrieval heads."""
        return [one for one in self.chosen if one.spec.saved]

    @property
    def chosen(self) -> Iterator[Selection]:
        """The selections there are."""
        return (one for one in self.selections if one is not None)

    def saved(self, starts: tuple[int, ...] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What ``restore`` needs: tensors by name, and plain data that JSON can hold."""
        rows = Rows(self.batch, 0, self.seen, starts)
        tensors = {}
        stores = {}
        for store in self.stores:
            kept, stores[store.heads.role] = store.saved(rows)
            tensors |= {f"{store.heads.role}.{name}": tensor for name, tensor in kept.items()}
        plain = {name: getattr(self, name) for name in SAVED}
        plain |= {"dtype": str(self.dtype).removeprefix("torch."), "stores": stores}
        for selection in self.remembering:
            kept, plain[selections.NAME] = selections.saved(selection)
            tensors |= {f"{selections.NAME}.{name}": tensor for name, tensor in kept.items()}
        return tensors, plain

    def check(
        self,
        plain: Mapping[str, Told],
        tensors: SavedTensors,
        prefix: str,
        rows: Rows,
        *,
        head_dim: int,
        group: int,
        staggered: bool,
    ) -> None:
        """Raise CacheError unless ``restore`` can take ``plain`` and the tensors whose names begin with ``prefix``.

        ``rows`` are all that was seen; ``head_dim`` and ``group`` are the model's, ``staggered`` the cache's.
        """
        words = [str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype.is_floating_point]
        dtype = getattr(torch, plain["dtype"].one_of(*words))
        expected = {"seen": rows.total, "batch": rows.batch, "head_dim": head_dim}
        expected["dense_bytes_per_token"] = 2 * head_dim * dtype.itemsize * self.plan.kv_heads
        for name, value in expected.items():
            plain[name].number(value, value)
        plain["autocast"].one_of(False, True)
        stores = plain["stores"].fields(*(store.heads.role for store in self.stores))
        for store in self.stores:
            told = stores[store.heads.role]
            n = len(store.heads.kv_heads)
            where = f"{prefix}{store.heads.role}."
            saved = SavedStore(told, tensors, where, rows, n, head_dim, dtype, staggered, group, store.parts)
            if staggered and not store.staggers:
                saved.refuse("the cache is staggered, which this store cannot be")
            store.check(saved)
            saved.close()
        for selection in self.remembering:
            n = len(self.plan.filled[self.selections.index(selection)].heads.kv_heads)
            heads = (n, n * group, head_dim)
            where = f"{prefix}{selections.NAME}."
            selections.check(selection, plain[selections.NAME], tensors, where, rows, heads, dtype)

    def restore(self, read: Callable[[str], Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
        """Fill this empty layer with what ``saved`` gave, each tensor as ``read(name)`` gives it, onto ``device``."""
        for store in self.stores:
            role = store.heads.role
            store.restore(lambda name, role=role: read(f"{role}.{name}"), plain["stores"][role], device)
        for selection in self.remembering:
            kept = plain[selections.NAME]
            selections.restore(selection, lambda name: read(f"{selections.NAME}.{name}"), kept, device)
        for name in SAVED:
            setattr(self, name, plain[name])
        self.dtype = getattr(torch, plain["dtype"])
        self.device = device
        self.is_initialized = True

    def offloaded(self) -> Iterable[tuple[str, int]]:
        for store in self.stores:
            yield from store.offloaded().items()


def _described(batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{batch} rows, {kv_heads} KV heads and head_dim {head_dim} in {dtype} on {device}"


def _length(query_length) -> int:
    """Transformers before 5.4 gives the positions of the new tokens instead of their number."""
    return query_length if isinstance(query_length, int) else query_length.shape[0]
