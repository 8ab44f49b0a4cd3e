"""Rolling a LongCtxCache back to fewer tokens, and what its stores remember for that."""

from __future__ import annotations

from torch import Tensor

from ..errors import CacheError
from ..layout.rows import Rows
from ..stores.base import SLACK
from .layer import LongCtxLayer


class RollBack:
    """Part of `LongCtxCache`."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: the last ``-n`` for a negative n, all but the first n for a positive n, none for 0.

        Also mends a cache whose forward was interrupted: every layer goes back to what all layers have seen.

        Raises:
            CacheError: a streaming head has dropped tokens that the shorter sequence needs, and does not remember
                them; nothing is changed.
        """
        seen = self.seen
        tokens_to_remove = whole(tokens_to_remove, "crop")
        target = min(seen, tokens_to_remove) if tokens_to_remove > 0 else max(0, seen + tokens_to_remove)
        if target == 0:
            self.reset()
            return
        self._refuse_half_written()
        if (stuck := self._stuck(target)) is not None:
            raise CacheError(self._no_way_back(stuck, target))
        if target < min(self._oldest_stock_crop, seen):
            raise CacheError(self._no_way_back_of_stock(target))
        for layer in self.own:
            layer.crop_to(Rows(max(self.batch_size, 1), 0, layer.seen, self.starts), target)
        self._crop_stock(seen - target)
        if self.starts is not None:
            self.starts = tuple(min(start, target) for start in self.starts)
        if self.ends is not None:
            self.ends = tuple(min(end, target) for end in self.ends)
        if self.prompt_end is not None and target < self.prompt_end:
            self.prompt_end = None
        for numbers in self.by_slot:
            numbers.crop(target)
        self.forward = None

    def _stuck(self, target: int) -> LongCtxLayer | None:
        """The first layer that cannot be cropped to ``target`` tokens."""
        return next((layer for layer in self.own if target < min(layer.oldest_crop, layer.seen)), None)

    def _no_way_back(self, layer: LongCtxLayer, target: int) -> str:
        """Why ``layer`` cannot be cropped to ``target`` tokens."""
        evicted = max((store.oldest_eviction for store in layer.evicting), default=0)
        if target < evicted:
            return (
                f"cannot crop from {layer.seen} to {target} tokens: tokens were evicted after {evicted}, and what left "
                "the cache cannot be rolled back. Crop to no fewer than that, call cache.reset() and read the prompt "
                "again, or fork() the cache before its prompt ends."
            )
        gathered = max((store.known.oldest_crop for store in layer.evicting), default=0)
        if target < gathered:
            return (
                f"cannot crop from {layer.seen} to {target} tokens: the prompt has not ended, and the score of its "
                f"eviction has taken in the queries of {gathered} tokens. Call cache.reset() and read the prompt again,"
                " or fork() the cache before."
            )
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

    def _no_way_back_of_stock(self, target: int) -> str:
        """Why the layers that Transformers computes cannot be cropped to ``target`` tokens."""
        kinds = ", ".join(sorted({type(layer).__name__ for layer in self.stock.values()}))
        return (
            f"cannot crop from {self.seen} to {target} tokens: this model has layers whose cache ({kinds}) cannot take "
            "back what it has read, in Transformers as well. Call cache.reset() and read the prompt again, or fork() "
            "the cache before what may be taken back. Drafts (assistant_model, prompt lookup) cannot be used."
        )

    @property
    def oldest_crop(self) -> int:
        """Fewest tokens that `crop` can still go back to, but for 0; more than were seen where it cannot at all."""
        return max(self._oldest_stock_crop, *(layer.oldest_crop for layer in self.own))

    def activate_past_recording(self) -> None:
        """Let streaming heads remember what they drop from now on: for a cache made with ``rollback=False``."""
        for layer in self.layers:
            getattr(layer, "activate_past_recording", bool)()

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether the streaming heads of a layer remember what they drop."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, LongCtxLayer):
            return getattr(layer, "record_past", False)
        return all(store.slack for store in layer.stores)


def whole(number: int | Tensor, method: str) -> int:
    """A whole number of tokens or times; Transformers 5.17 passes a tensor."""
    if isinstance(number, Tensor) and not number.dim() and not number.is_floating_point():
        return int(number)
    if type(number) is not int:
        raise CacheError(f"{method}({number!r}): expected a whole number.")
    return number
