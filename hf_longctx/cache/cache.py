"""LongCtxCache: a Transformers cache in which every KV head keeps only what its role needs.

A layer's ``update`` returns one ``LayerKV`` as both key and value: Transformers hands it untouched to the registered
attention function. Everything else of the ``Cache`` interface (beams, rollback, lengths, masks) behaves as in a dense
cache of the same number of seen tokens.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..decode._selection import settle
from ..errors import CacheError, UnsupportedModeError, UnsupportedModelError
from ..layout.dtypes import as_autocast
from ..layout.forward import Forward
from ..layout.rows import Rows
from ..stores.base import SLACK
from . import file as cache_file
from .bytes import storage_bytes
from .compression import Compression
from .dense_members import DenseCacheMembers
from .handles import new_handle
from .layer import LongCtxLayer
from .layer_kv import LayerKV
from .plan import FEWEST, LayerPlan
from .roll_back import RollBack
from .sequences import SequenceOperations
from .stock_layers import StockLayers, copied, stock_layers, tensors_of
from .surprisals import Surprisals
from .token_ids import TokenIds


class LongCtxCache(SequenceOperations, RollBack, Compression, StockLayers, DenseCacheMembers, Cache):
    """KV cache of a patched model.

    Args:
        model: a model that ``patch_model`` patched (or a wrapper around one).
        max_tokens: reserve room for so many tokens at the first forward and never allocate again. More tokens than
            that are a ``CacheError``. None: buffers grow, by an eighth at a time.
        rollback: whether streaming heads remember the last 255 tokens that they dropped, so that `crop` and `stagger`
            can take them back. False saves that memory, as ``generate`` does for a cache that it does not hand out;
            `activate_past_recording` turns it on later.

    Raises:
        UnsupportedModelError: the model is not patched.
        UnsupportedModeError: the model was cut to layers none of which is patched.
    """

    def __init__(self, model: nn.Module, max_tokens: int | None = None, *, rollback: bool = True):
        patched = next((module for module in model.modules() if "longctx_state" in vars(module)), None)
        if patched is None:
            raise UnsupportedModelError("LongCtxCache needs a patched model: call patch_model(model) first.")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise CacheError(f"max_tokens must be a positive whole number of tokens, given {max_tokens!r}.")
        # Early-exit drafting lowers the number of layers for a while.
        count = patched.config.num_hidden_layers
        plans = tuple(plan for plan in patched.longctx_state.plans if plan.layer_idx < count)
        if not plans:
            raise UnsupportedModeError(
                f"the first {count} layers of this model have no attention over the text, so a model cut to them (as "
                "assistant_early_exit does) has no keys to count its tokens by. Leave that out."
            )
        slack = SLACK if rollback else 0
        self.own = [LongCtxLayer(plan, max_tokens, slack) for plan in plans]
        self._blank = stock_layers(patched.config, {plan.layer_idx for plan in plans})
        self._read: dict[int, int] = {}
        self._reading = 0  # tokens after the forward that is being read
        layers = {index: copied(layer) for index, layer in self._blank.items()}
        layers |= {layer.plan.layer_idx: layer for layer in self.own}
        super().__init__(layers=[layers[index] for index in range(count)])
        self.plans = plans
        self.handle = new_handle(self)
        self.model = weakref.ref(patched)
        self.max_tokens = max_tokens
        self.token_ids = TokenIds(max_tokens)
        self.surprisals = Surprisals(max_tokens) if self.rule is not None and self.rule.surprises else None
        self.staggered = False
        self.ahead: tuple[int, ...] | None = None  # positions by sequence, of a multimodal model
        self.starts: tuple[int, ...] | None = None
        self.ends: tuple[int, ...] | None = None
        self.forward: Forward | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "forward": None, "model": None, "handle": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.handle = new_handle(self)
        if any(tensor.is_inference() for tensor in self.tensors()):
            for layer in self.own:  # copied or unpickled in inference mode, to be continued outside of it
                for store in layer.stores:
                    store.map_rows(torch.clone)
                for selection in layer.chosen:
                    selection.map_rows(torch.clone, layer.batch)
            self._change_stock(torch.clone)
            for numbers in self.by_slot:
                numbers.map_rows(torch.clone)

    def __repr__(self) -> str:
        rows = max(self.batch_size, 0)
        return f"{type(self).__name__}(layers={len(self)}, rows={rows}, tokens={self.seen}, bytes={self.nbytes})"

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has seen a forward."""
        return all(layer.is_initialized for layer in self.own)

    @property
    def max_cache_len(self) -> int:
        """Tokens the cache can hold, -1 for no limit (PEFT's prefix tuning asks)."""
        return -1 if self.max_tokens is None else self.max_tokens

    @property
    def seen(self) -> int:
        """Tokens that went through every layer, pads included."""
        return min(layer.seen for layer in self.own)

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is held of keys, values and states."""
        return (tensor for layer in self.layers for tensor in tensors_of(layer))

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values really take, spare room included; host memory counts, files do not.

        The states of layers without keys count as well. Token ids, and what a score keeps of each token's likelihood,
        are extra: 4 bytes each.
        """
        return storage_bytes(self.tensors())

    @property
    def nbytes_offloaded(self) -> dict[str, int]:
        """Bytes that stores keep outside of the device: ``in host memory`` (in ``nbytes`` as well) and ``on disk``."""
        found: dict[str, int] = {}
        for place, count in (item for layer in self.own for item in layer.offloaded()):
            found[place] = found.get(place, 0) + count
        return found

    @property
    def nbytes_dense(self) -> int:
        """Bytes a dense cache would hold after the same tokens."""
        filled = [layer for layer in self.own if layer.is_initialized]
        return sum(layer.dense_bytes_per_token * layer.seen * layer.batch for layer in filled) + self.stock_nbytes

    @property
    def batch_size(self) -> int:
        """Rows of the cache, -1 before the first forward."""
        return next((layer.batch for layer in self.own if layer.is_initialized), -1)

    @property
    def ids(self) -> Tensor | None:
        """Ids ``[B, seen]`` (int64) of the tokens seen, pads included.

        None where some are not known: they came as ``inputs_embeds``, or their keys were written by ``update``.
        """
        return self.token_ids.known(self.seen)

    @property
    def by_slot(self) -> tuple[TokenIds, ...]:
        """What is kept of each token beside its keys and values."""
        return (self.token_ids,) if self.surprisals is None else (self.token_ids, self.surprisals)

    def begin(self, forward: Forward, ids: Tensor | None = None) -> None:
        """Check that this cache can take ``forward``, before any layer writes.

        Args:
            ids: the new tokens' ids ``[B, T]``, where they are known.

        Raises:
            CacheError: the rows do not continue the cached ones, or the forward does not fit into ``max_tokens``.
        """
        rows = forward.rows
        if not rows.new:
            raise CacheError("this forward brings no tokens, and a cache needs at least one. Pass the next ones.")
        if self.batch_size not in (-1, rows.batch):
            times, rest = divmod(rows.batch, self.batch_size)
            why = (
                ""
                if rest
                else f" or, for beams and num_return_sequences, cache.batch_repeat_interleave({times}) before"
            )
            raise CacheError(
                f"this cache holds {self.batch_size} rows, the forward brings {rows.batch}. Use a new cache{why}."
            )
        if rows.past and self.ends is not None and min(self.ends) < rows.past:
            raise CacheError(
                "this cache was filled from right-padded rows and cannot be continued: the next token would not follow "
                "the last real one. Pad on the left (tokenizer.padding_side = 'left')."
            )
        self._check_room(rows)
        self._check_starts(rows)
        if any(layer.plan.learns and layer.plan.selecting(rows) for layer in self.own if layer.is_initialized):
            self.settle()
        self._end_due_prompt(rows, forward.prompt)
        self._thaw_stock()
        self.forward = forward
        self._reading = rows.total
        self.token_ids.append(rows.past, ids)

    def reopen(self, new: int) -> None:
        """A prompt goes on by ``new`` tokens: let selections learn from all of it, where these are enough for that."""
        rows = Rows(self.batch_size, 0, self.seen, self.starts)
        for selection in (one for layer in self.own for one in layer.chosen):
            if 0 < selection.spec.queries <= new >= FEWEST:
                selection.reopen(rows)

    def settle(self) -> None:
        """End the prompt here for selections that learn from all layers together, where they have not done so yet."""
        waiting = [pair for layer in self.own for pair in layer.waiting()]
        if waiting:
            rows = Rows(self.batch_size, 0, self.seen, self.starts)
            with torch.no_grad(), torch.autocast(self.own[0].device.type, enabled=False):
                settle([(one, store.held(rows)) for one, store in waiting], rows)

    def select_by(self, plans: Sequence[LayerPlan]) -> None:
        """Go on by the selections of ``plans``, which differ from its own in nothing else.

        What is cached does not depend on what decoded tokens read of it. Their indexes are built anew.
        """
        self.plans = tuple(plans)
        for layer, plan in zip(self.own, plans, strict=True):
            layer.select_by(plan)

    def check(self) -> None:
        """Raise CacheError when an earlier forward was interrupted."""
        self._refuse_apart()
        if (most := max(layer.seen for layer in self.own)) != self.seen:
            instead = "Call cache.crop(0) to go back to before it, or cache.reset()."
            if self.seen and self._stuck(self.seen) is not None:
                instead = "Its streaming heads cannot go back: call cache.reset() and read the prompt again."
            raise CacheError(
                f"the layers of this cache have seen between {self.seen} and {most} tokens: "
                f"an earlier forward was interrupted. {instead}"
            )
        self._refuse_half_written()

    def _refuse_half_written(self) -> None:
        torn = [layer.plan.layer_idx for layer in self.own if not layer.whole]
        if torn:
            raise CacheError(
                f"layer {torn[0]} of this cache was interrupted while it was written, so what it holds is not known. "
                "Call cache.reset() and read the prompt again."
            )

    def _check_room(self, rows: Rows) -> None:
        if self.max_tokens is not None and rows.total > self.max_tokens:
            raise CacheError(
                f"the cache has room for max_tokens={self.max_tokens} tokens, this forward needs {rows.total}. "
                "Make the cache with a larger max_tokens, or without."
            )

    def _check_starts(self, rows: Rows) -> None:
        if rows.past == 0:
            return
        old = self.starts or (0,) * rows.batch
        new = rows.starts or (0,) * rows.batch
        for row, (before, now) in enumerate(zip(old, new, strict=True)):
            if now != before and not (before == rows.past <= now):
                what = "has no attention_mask" if rows.starts is None else f"says {now} in its attention_mask"
                raise CacheError(
                    f"row {row} of the cache starts at token {before}, this forward {what}. Pass the attention_mask "
                    "that covers the cached tokens as well, its rows in their order."
                )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[LayerKV, LayerKV]:
        """Keep k, v ``[B, H_kv, T, D]`` of layer ``layer_idx``; the result is for the patched attention only.

        May be called directly, layer by layer, to fill a cache by hand.

        Raises:
            CacheError: the keys have other rows or KV heads than the cache, or do not fit into ``max_tokens``.
        """
        layer = self.layers[layer_idx]
        new = key_states.shape[2]
        if not isinstance(layer, LongCtxLayer):
            self._read[layer_idx] = layer.get_seq_length() + new
            return layer.update(key_states, value_states)
        forward = self.forward
        if forward is None or (forward.rows.past, forward.rows.new) != (layer.seen, new):
            rows = Rows(key_states.shape[0], layer.seen, new, self.starts)
            forward = self.forward = Forward(rows, prompt=self.reads_prompt(rows))
            self._check_room(forward.rows)
            self.token_ids.append(forward.rows.past, None)
        result = layer.take_step(key_states, value_states, forward) if forward.steps else None
        if result is None:
            result = layer.update(*as_autocast(key_states, value_states), forward)
        self.starts = forward.rows.starts
        self.ends = forward.rows.ends
        if layer is self.own[-1]:
            self.forward = None  # with the tensors its layers shared
        return result, result

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (not kept), pads included."""
        if layer_idx >= len(self.layers):
            return 0
        layer = self.layers[layer_idx]
        return layer.seen if isinstance(layer, LongCtxLayer) else self.seen

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        layer = self.layers[layer_idx]
        return (layer if hasattr(layer, "get_mask_sizes") else self.own[0]).get_mask_sizes(query_length)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for layer in self.own:
            layer.reset()
        self._reset_stock()
        for numbers in self.by_slot:
            numbers.reset()
        self.forward = None
        self.starts = None
        self.ends = None
        self.ahead = None
        self.staggered = False
        self.prompt_end = None
        self.reading = False
        self.scored = False

    def fork(self) -> LongCtxCache:
        """A cache that goes on from here independently of this one.

        What retrieval heads kept so far is shared, never copied: both read it, and write what comes after to memory
        of their own. The constant memory of streaming heads is copied. ``batch_repeat_interleave`` of a fork of one
        row shares it too, so that many questions about one prompt hold it once.

        Raises:
            CacheError: an earlier forward was interrupted.
        """
        self.check()
        other = type(self).__new__(type(self))
        layers = [layer.fork() if isinstance(layer, LongCtxLayer) else copied(layer) for layer in self.layers]
        own = [layer for layer in layers if isinstance(layer, LongCtxLayer)]
        other.__dict__ |= vars(self) | {"layers": layers, "own": own, "_read": dict(self._read), "forward": None}
        other.token_ids = self.token_ids.fork()
        other.surprisals = None if self.surprisals is None else self.surprisals.fork()
        other.model = self.model
        other.handle = new_handle(other)
        return other

    def save(self, path: str | os.PathLike, *, ids: Tensor | None = None, model: nn.Module | None = None) -> None:
        """Write the cache, its tokens' ids and what it fits into one safetensors file, from which ``load`` goes on.

        The file is replaced in one step, and only by a whole one, whenever the process is killed.

        Args:
            ids: token ids ``[B, seen]``, pads included, where ``self.ids`` does not know them.
            model: the model that filled the cache, where it was unpickled and not used since.

        Raises:
            CacheError: the cache is empty, half written, holds NaN or inf, its ids or its model are not known, or the
                file cannot be written.
            UnsupportedModeError: the model's weights are not all in the memory of this process.
        """
        cache_file.save(self, path, ids, model)

    @classmethod
    def load(cls, path: str | os.PathLike, model: nn.Module) -> LongCtxCache:
        """The cache that ``save`` wrote, on the devices of the model's layers.

        Args:
            model: a patched model with the weights, roles and stores of the one that filled the cache; kernel and
                prefill patterns may differ.

        Raises:
            CacheError: there is no such file, it is damaged or something else, it was made with another model, config
                or a newer version, or holds NaN or inf.
            UnsupportedModelError: the model is not patched.
            UnsupportedModeError: the model's weights are not all in the memory of this process.
        """
        return cache_file.load(path, model, cls)


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache really holds, a ``LongCtxCache`` or a dense one of Transformers.

    A dense sliding layer whose keys are a view of the whole prompt's holds all of them. Of a prompt that has not ended
    yet, what will be held then.
    """
    if isinstance(cache, LongCtxCache):
        if cache.evicts and cache.reading:
            cache = cache.fork()
            cache.evict()
        return cache.nbytes
    return storage_bytes(tensor for layer in cache.layers for tensor in tensors_of(layer))
