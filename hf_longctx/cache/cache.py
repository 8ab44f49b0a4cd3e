"""LongCtxCache: a Transformers cache in which every KV head keeps only what its role needs.

A layer's ``update`` returns one ``LayerKV`` as both key and value: Transformers hands it untouched to the registered
attention function. Everything else of the ``Cache`` interface (beams, rollback, lengths, masks) behaves as in a dense
cache of the same number of seen tokens.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..errors import CacheError, UnsupportedModelError
from ..layout.dtypes import as_autocast
from ..layout.forward import Forward
from ..layout.rows import Rows
from ..stores.base import SLACK
from . import file as cache_file
from .bytes import storage_bytes
from .dense_members import DenseCacheMembers
from .layer import LayerKV, LongCtxLayer
from .token_ids import TokenIds


class LongCtxCache(DenseCacheMembers, Cache):
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
    """

    def __init__(self, model: nn.Module, max_tokens: int | None = None, *, rollback: bool = True):
        patched = next((module for module in model.modules() if "longctx_state" in vars(module)), None)
        if patched is None:
            raise UnsupportedModelError("LongCtxCache needs a patched model: call patch_model(model) first.")
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise CacheError(f"max_tokens must be a positive whole number of tokens, given {max_tokens!r}.")
        # Early-exit drafting lowers the number of layers for a while.
        plans = patched.longctx_state.plans[: patched.config.num_hidden_layers]
        slack = SLACK if rollback else 0
        super().__init__(layers=[LongCtxLayer(plan, max_tokens, slack) for plan in plans])
        self.plans = plans
        self.model = weakref.ref(patched)
        self.max_tokens = max_tokens
        self.token_ids = TokenIds(max_tokens)
        self.staggered = False
        self.starts: tuple[int, ...] | None = None
        self.ends: tuple[int, ...] | None = None
        self.forward: Forward | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "forward": None, "model": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if any(tensor.is_inference() for layer in self.layers for tensor in layer.tensors()):
            for layer in self.layers:  # copied or unpickled in inference mode, to be continued outside of it
                for store in layer.stores:
                    store.map_rows(torch.clone)
            self.token_ids.map_rows(torch.clone)

    def __repr__(self) -> str:
        rows = max(self.batch_size, 0)
        return f"{type(self).__name__}(layers={len(self)}, rows={rows}, tokens={self.seen}, bytes={self.nbytes})"

    @property
    def is_initialized(self) -> bool:
        """Whether every layer has seen a forward."""
        return all(layer.is_initialized for layer in self.layers)

    @property
    def max_cache_len(self) -> int:
        """Tokens the cache can hold, -1 for no limit (PEFT's prefix tuning asks)."""
        return -1 if self.max_tokens is None else self.max_tokens

    @property
    def seen(self) -> int:
        """Tokens that went through every layer, pads included."""
        return min(layer.seen for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values really take, spare room included; host memory counts, files do not.

        Token ids (4 bytes each) are extra.
        """
        return storage_bytes(tensor for layer in self.layers for tensor in layer.tensors())

    @property
    def nbytes_offloaded(self) -> dict[str, int]:
        """Bytes that stores keep outside of the device: ``in host memory`` (in ``nbytes`` as well) and ``on disk``."""
        found: dict[str, int] = {}
        for place, count in (item for layer in self.layers for item in layer.offloaded()):
            found[place] = found.get(place, 0) + count
        return found

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

    @property
    def ids(self) -> Tensor | None:
        """Ids ``[B, seen]`` (int64) of the tokens seen, pads included.

        None where some are not known: they came as ``inputs_embeds``, or their keys were written by ``update``.
        """
        return self.token_ids.known(self.seen)

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
        self.forward = forward
        self.token_ids.append(rows.past, ids)

    def check(self) -> None:
        """Raise CacheError when an earlier forward was interrupted."""
        if (most := max(layer.seen for layer in self.layers)) != self.seen:
            instead = "Call cache.crop(0) to go back to before it, or cache.reset()."
            if self.seen and self._stuck(self.seen) is not None:
                instead = "Its streaming heads cannot go back: call cache.reset() and read the prompt again."
            raise CacheError(
                f"the layers of this cache have seen between {self.seen} and {most} tokens: "
                f"an earlier forward was interrupted. {instead}"
            )
        self._refuse_half_written()

    def _refuse_half_written(self) -> None:
        torn = [layer.plan.layer_idx for layer in self.layers if not layer.whole]
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
        layer, new = self.layers[layer_idx], key_states.shape[2]
        forward = self.forward
        if forward is None or (forward.rows.past, forward.rows.new) != (layer.seen, new):
            forward = self.forward = Forward(Rows(key_states.shape[0], layer.seen, new, self.starts))
            self._check_room(forward.rows)
            self.token_ids.append(forward.rows.past, None)
        result = layer.update(*as_autocast(key_states, value_states), forward)
        self.starts, self.ends = forward.rows.starts, forward.rows.ends
        if layer_idx == len(self.layers) - 1:
            self.forward = None  # with the tensors its layers shared
        return result, result

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen (not kept), pads included."""
        return self.layers[layer_idx].seen if layer_idx < len(self.layers) else 0

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: the last ``-n`` for a negative n, all but the first n for a positive n, none for 0.

        Also mends a cache whose forward was interrupted: every layer goes back to what all layers have seen.

        Raises:
            CacheError: a streaming head has dropped tokens that the shorter sequence needs, and does not remember
                them; nothing is changed.
        """
        seen, tokens_to_remove = self.seen, _whole(tokens_to_remove, "crop")
        target = min(seen, tokens_to_remove) if tokens_to_remove > 0 else max(0, seen + tokens_to_remove)
        if target == 0:
            self.reset()
            return
        self._refuse_half_written()
        if (stuck := self._stuck(target)) is not None:
            raise CacheError(self._no_way_back(stuck, target))
        for layer in self.layers:
            layer.crop_to(Rows(max(self.batch_size, 1), 0, layer.seen, self.starts), target)
        if self.starts is not None:
            self.starts = tuple(min(start, target) for start in self.starts)
        if self.ends is not None:
            self.ends = tuple(min(end, target) for end in self.ends)
        self.token_ids.crop(target)
        self.forward = None

    def _stuck(self, target: int) -> LongCtxLayer | None:
        """The first layer that cannot be cropped to ``target`` tokens."""
        return next((layer for layer in self.layers if target < min(layer.oldest_crop, layer.seen)), None)

    def _no_way_back(self, layer: LongCtxLayer, target: int) -> str:
        """Why ``layer`` cannot be cropped to ``target`` tokens."""
        if not self.is_recording_past(layer.plan.layer_idx):
            return (
                f"cannot take back {layer.seen - target} tokens: this cache was made with rollback=False (generate() "
                "makes it so where it does not hand it out), so its streaming heads do not remember what they dropped. "
                "Call cache.activate_past_recording() before it reads what may be taken back, or pass a "
                "LongCtxCache(model) of your own."
            )
        return (
            f"cannot crop from {layer.seen} to {target} tokens: layer {layer.plan.layer_idx} can go back to "
            f"{layer.oldest_crop} at most, older tokens of its streaming heads are gone (at most {SLACK} can be "
            "taken back, so drafts must not be longer). Call cache.reset() and read the prompt again."
        )

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for layer in self.layers:
            layer.reset()
        self.token_ids.reset()
        self.forward, self.starts, self.ends, self.staggered = None, None, None, False

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
        other.__dict__ |= vars(self) | {"layers": [layer.fork() for layer in self.layers], "forward": None}
        other.token_ids, other.model = self.token_ids.fork(), self.model
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

    @property
    def oldest_crop(self) -> int:
        """Fewest tokens that `crop` can still go back to, but for 0; more than were seen where it cannot at all."""
        return max(layer.oldest_crop for layer in self.layers)

    @property
    def stagger_room(self) -> int:
        """How far `stagger` can take rows back: tokens."""
        stores = [store for layer in self.layers for store in layer.stores]
        if any(self.starts or ()) or self.ends or not all(store.staggers and not store.state for store in stores):
            return 0
        return max(0, self.seen - max(1, self.oldest_crop))

    def stagger(self, pads: Sequence[int]) -> None:
        """Row ``i`` gives back its last ``pads[i]`` tokens and gets as many left pads; what is seen stays the same.

        So rows that share one prompt go on by texts of different lengths, still sharing it: as a left-padded batch of
        whole texts, of which the next forward brings the columns from ``seen`` on. Its positions count real tokens, as
        ``generate`` has it; a forward without ``position_ids`` gets those.

        Raises:
            CacheError: rows cannot go so far back (`stagger_room`); nothing is changed.
        """
        self.check()
        if len(pads) != self.batch_size or min(pads) < 0 or max(pads) > self.stagger_room:
            raise CacheError(
                f"cannot stagger {self.batch_size} rows by {list(pads)}: give one number a row, from 0 to "
                f"{self.stagger_room}, the tokens that this cache can take back. Read texts of one length together."
            )
        if not any(pads):
            return
        for layer in self.layers:
            layer.stagger(Rows(self.batch_size, 0, layer.seen), pads)
        self.token_ids.stagger(pads)
        self.starts, self.forward, self.staggered = tuple(pads), None, True

    def activate_past_recording(self) -> None:
        """Let streaming heads remember what they drop from now on: for a cache made with ``rollback=False``."""
        for layer in self.layers:
            layer.activate_past_recording()

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the streaming heads of a layer remember what they drop."""
        return all(store.slack for store in self.layers[layer_idx].stores)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was; CacheError for a half-written cache."""
        beam_idx = torch.as_tensor(beam_idx)
        self._map_rows(beam_idx, lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, next to each other; CacheError for a half-written cache."""
        repeats = _whole(repeats, "batch_repeat_interleave")
        if repeats < 1:
            raise CacheError(f"batch_repeat_interleave({repeats}): every row must stay at least once.")
        rows = torch.arange(self.batch_size).repeat_interleave(repeats)
        self._map_rows(rows, lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor | Sequence[int] | slice) -> None:
        """Keep the rows ``indices``, whatever a tensor's first dimension takes; CacheError for a half-written cache."""
        if self.batch_size == -1:
            return
        given = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        try:
            rows = torch.arange(self.batch_size)[given]
        except IndexError:
            rows = torch.empty(0, dtype=torch.int64)
        if rows.dim() != 1 or not len(rows):
            raise CacheError(
                f"batch_select_indices({indices}): this cache holds {self.batch_size} rows; give a list of those to "
                "keep."
            )
        self._map_rows(rows, lambda tensor: tensor[rows.to(tensor.device)])

    def _map_rows(self, picked: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        if self.batch_size == -1:
            return
        self._refuse_half_written()
        if self.starts is not None or self.ends is not None:
            rows = picked.tolist()
            self.starts = self.starts and tuple(self.starts[row] for row in rows)
            self.ends = self.ends and tuple(self.ends[row] for row in rows)
        filled = [layer for layer in self.layers if layer.is_initialized]
        for layer in filled:
            layer.whole = False  # also where this is interrupted between two layers
        for layer in filled:
            layer.map_rows(change, picked.numel())
        self.token_ids.map_rows(change)
        self.forward = None


def _whole(number: int | Tensor, method: str) -> int:
    """A whole number of tokens or times; Transformers 5.17 passes a tensor."""
    if isinstance(number, Tensor) and not number.dim() and not number.is_floating_point():
        return int(number)
    if type(number) is not int:
        raise CacheError(f"{method}({number!r}): expected a whole number.")
    return number


def cache_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache really holds, a ``LongCtxCache`` or a dense one of Transformers.

    A dense sliding layer whose keys are a view of the whole prompt's holds all of them.
    """
    if isinstance(cache, LongCtxCache):
        return cache.nbytes
    filled = (layer for layer in cache.layers if getattr(layer, "is_initialized", False))
    return storage_bytes(tensor for layer in filled for tensor in (layer.keys, layer.values))
