"""LongCtxCache: a Transformers cache in which every KV head keeps only what its role needs.

A layer's ``update`` returns one ``LayerKV`` as both key and value: Transformers hands it untouched to the registered
attention function. Everything else of the ``Cache`` interface (beams, rollback, lengths, masks) behaves as in a dense
cache of the same number of seen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import CacheError, UnsupportedModeError, UnsupportedModelError
from .kernels.layout import HeadKV
from .layer_plan import LayerPlan
from .rows import Rows
from .stores.base import Store


@dataclass
class LayerKV:
    """What one layer's cache hands to the attention function: one ``HeadKV`` per role, and the rows they belong to."""

    heads: list[HeadKV]
    rows: Rows

    @property
    def shape(self) -> None:
        """What any other attention function asks a key for first."""
        raise UnsupportedModeError(
            "a LongCtxCache reached an attention function that is not the patched one: the model is not patched, or "
            "was unpatched while the cache lived. Patch it again, or start with a new cache."
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None) -> None:
        """An attention function that asks for no shape (Transformers 5.0) goes straight to torch: the same error."""
        given = (*args, *(kwargs or {}).values())
        return next(kept.shape for kept in given if isinstance(kept, cls))


class LongCtxLayer(CacheLayerMixin):
    """The stores of one layer, one per role."""

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: LayerPlan, max_tokens: int | None = None):
        super().__init__()
        self.plan = plan
        self.seen = 0
        self.stores: list[Store] = [plan.stores[heads.role].new(heads, max_tokens) for heads in plan.heads]
        self.dense_bytes_per_token = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        per_head = (
            key_states.shape[-1] * key_states.element_size() + value_states.shape[-1] * value_states.element_size()
        )
        self.batch, self.dtype, self.device = key_states.shape[0], key_states.dtype, key_states.device
        self.dense_bytes_per_token = per_head * key_states.shape[1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, rows: Rows) -> LayerKV:
        """Keep k, v ``[B, H_kv, T, D]`` of this forward; return what its queries read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[:2] != (self.batch, len(self.plan.roles)):
            raise CacheError(
                f"layer {self.plan.layer_idx} got keys of {key_states.shape[0]} rows and {key_states.shape[1]} KV "
                f"heads, but this cache holds {self.batch} rows and {len(self.plan.roles)} KV heads. Use a new cache."
            )
        heads = [store.append(key_states, value_states, rows) for store in self.stores]
        self.seen = rows.total
        return LayerKV(heads, rows)

    def get_seq_length(self) -> int:
        """Tokens seen (not kept), pads included."""
        return self.seen

    def get_mask_sizes(self, query_length) -> tuple[int, int]:
        return self.seen + _length(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def crop_to(self, rows: Rows, target: int) -> None:
        if target < self.seen:
            for store in self.stores:
                store.crop(rows, target)
            self.seen = target

    def map_rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        if self.is_initialized:
            for store in self.stores:
                store.map_rows(change)
            self.batch = batch

    def reset(self) -> None:
        for store in self.stores:
            store.reset()
        self.seen, self.is_initialized = 0, False

    def tensors(self) -> Iterable[Tensor]:
        for store in self.stores:
            yield from store.tensors()


class LongCtxCache(Cache):
    """KV cache of a patched model.

    Args:
        model: a model that ``patch_model`` patched (or a wrapper around one).
        max_tokens: reserve room for so many tokens at the first forward and never allocate again. More tokens than
            that are a ``CacheError``. None: buffers grow, by an eighth at a time.

    Raises:
        UnsupportedModelError: the model is not patched.
    """

    def __init__(self, model: nn.Module, max_tokens: int | None = None):
        plans = plans_of(model)
        if not plans:
            raise UnsupportedModelError("LongCtxCache needs a patched model: call patch_model(model) first.")
        if max_tokens is not None and max_tokens < 1:
            raise CacheError(f"max_tokens must be a positive number of tokens, given {max_tokens}.")
        super().__init__(layers=[LongCtxLayer(plan, max_tokens) for plan in plans])
        self.plans = plans
        self.max_tokens = max_tokens
        self.starts: tuple[int, ...] | None = None
        self.right_padded = False
        self.rows: Rows | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "rows": None}

    @property
    def seen(self) -> int:
        """Tokens that went through every layer, pads included."""
        return min(layer.seen for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the cache really holds, spare room included."""
        storages = {}
        for layer in self.layers:
            for tensor in layer.tensors():
                storages[tensor.untyped_storage().data_ptr(), tensor.device] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    @property
    def nbytes_dense(self) -> int:
        """Bytes a dense cache would hold after the same tokens."""
        return sum(
            layer.dense_bytes_per_token * layer.seen * layer.batch for layer in self.layers if layer.is_initialized
        )

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first forward."""
        return next((layer.batch for layer in self.layers if layer.is_initialized), -1)

    def begin(self, rows: Rows) -> None:
        """Check that this cache can take the forward that ``rows`` describes, before any layer writes.

        Raises:
            CacheError: an earlier forward was interrupted, the rows do not continue the cached ones, or the forward
                does not fit into ``max_tokens``.
        """
        if (most := max(layer.seen for layer in self.layers)) != self.seen:
            raise CacheError(
                f"the layers of this cache have seen between {self.seen} and {most} tokens: "
                "an earlier forward was interrupted. Call cache.crop(0) to go back to before it, or cache.reset()."
            )
        if self.batch_size not in (-1, rows.batch):
            raise CacheError(
                f"this cache holds {self.batch_size} rows, the forward brings {rows.batch}. Use a new cache."
            )
        if rows.past and self.right_padded:
            raise CacheError(
                "this cache was filled from right-padded rows and cannot be continued: the next token would not follow "
                "the last real one. Pad on the left (tokenizer.padding_side = 'left')."
            )
        if self.max_tokens is not None and rows.total > self.max_tokens:
            raise CacheError(
                f"the cache has room for max_tokens={self.max_tokens} tokens, this forward needs {rows.total}. "
                "Make the cache with a larger max_tokens, or without."
            )
        self._check_starts(rows)
        self.rows, self.starts, self.right_padded = rows, rows.starts, rows.right_padded

    def _check_starts(self, rows: Rows) -> None:
        if rows.past == 0:
            return
        old = self.starts or (0,) * rows.batch
        new = rows.starts or (0,) * rows.batch
        for row, (before, now) in enumerate(zip(old, new, strict=True)):
            if now != before and not (before == rows.past <= now):
                raise CacheError(
                    f"row {row} of the cache starts at token {before}, the attention_mask of this forward says {now}. "
                    "Pass the attention_mask that covers the cached tokens as well."
                )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[LayerKV, LayerKV]:
        """Keep k, v ``[B, H_kv, T, D]`` of layer ``layer_idx``; the result is for the patched attention only.

        May be called directly, layer by layer, to fill a cache by hand.

        Raises:
            CacheError: the keys have other rows or KV heads than the cache, or do not fit into ``max_tokens``.
        """
        layer, new = self.layers[layer_idx], key_states.shape[2]
        if self.rows is None or (self.rows.past, self.rows.new) != (layer.seen, new):
            rows = Rows(key_states.shape[0], layer.seen, new, self.starts)
            if self.max_tokens is not None and rows.total > self.max_tokens:
                raise CacheError(f"{rows.total} tokens do not fit into max_tokens={self.max_tokens}.")
            self.rows = rows
        kept = layer.update(key_states, value_states, self.rows)
        return kept, kept

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (not kept), pads included."""
        return self.layers[layer_idx].seen if layer_idx < len(self.layers) else 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: the last ``-n`` for a negative n, all but the first n for a positive n, none for 0.

        Also mends a cache whose forward was interrupted: every layer goes back to what all layers have seen.

        Raises:
            CacheError: a streaming head has dropped tokens that the shorter sequence needs; nothing is changed.
        """
        seen, tokens_to_remove = self.seen, int(tokens_to_remove)  # Transformers 5.17 passes a tensor
        target = min(seen, tokens_to_remove) if tokens_to_remove > 0 else max(0, seen + tokens_to_remove)
        if target == 0:
            self.reset()
            return
        for layer in self.layers:
            possible = max(store.oldest_crop(layer.seen) for store in layer.stores)
            if target < min(possible, layer.seen):
                raise CacheError(
                    f"cannot crop from {layer.seen} to {target} tokens: layer {layer.plan.layer_idx} can go back to "
                    f"{possible} at most, older tokens of its streaming heads are gone. Call cache.reset() and read "
                    "the prompt again."
                )
        for layer in self.layers:
            layer.crop_to(Rows(max(self.batch_size, 1), 0, layer.seen, self.starts), target)
        if self.starts is not None:
            self.starts = tuple(min(start, target) for start in self.starts)
        self.rows = None

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for layer in self.layers:
            layer.reset()
        self.rows, self.starts, self.right_padded = None, None, False

    def activate_past_recording(self) -> None:
        """Nothing to turn on: streaming heads always remember what a bounded rollback needs."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        self._map_rows(beam_idx, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to each other."""
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self._map_rows(rows, lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        self._map_rows(torch.arange(self.batch_size)[indices.cpu()], lambda tensor: tensor[indices.to(tensor.device)])

    def _map_rows(self, picked: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        if self.batch_size == -1:
            return
        if self.starts is not None:
            self.starts = tuple(self.starts[row] for row in picked.tolist())
        for layer in self.layers:
            layer.map_rows(change, picked.numel())
        self.rows = None


def plans_of(model: nn.Module) -> tuple[LayerPlan, ...]:
    """The plans of a patched model's layers, by layer index; none for any other model."""
    plans = (module.longctx_plan for module in model.modules() if hasattr(module, "longctx_plan"))
    return tuple(sorted(plans, key=lambda plan: plan.layer_idx))


def _length(query_length) -> int:
    """Transformers before 5.4 gives the positions of the new tokens instead of their number."""
    return query_length if isinstance(query_length, int) else query_length.shape[0]
