"""Where a prompt ends, and what leaves the cache there: budgets by score, of one layer or of all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config.bounds import MOST
from ..config.words import spec_word
from ..errors import CacheError
from ..eviction._budgets import by_head, by_model, pyramid, uniform
from ..layout.rows import Rows
from ..stores._evicted import EvictedStore
from ..stores.evicted import Evicted
from .layer import LongCtxLayer
from .plan import FEWEST, LETTERS

WAITS = (
    "eviction: a prompt ended before cache.compress() was called, which score {} waits for; all its tokens were cached"
)

Scored = list[list[Tensor]]  # of each sequence's KV heads


class Eviction:
    """Part of `LongCtxCache`.

    Attributes:
        prompt_end: tokens after which the prompt ends that is being read, as generate() says; None: not known.
        reading: a prompt was read since the last end of one.
        paused: nothing is evicted: a copy on which something is read to judge the tokens by.
        scored: a prompt has ended and was scored, or no store scores one where it ends.
    """

    prompt_end: int | None = None
    reading: bool = False
    paused: bool = False
    scored: bool = False

    def reads_prompt(self, rows: Rows) -> bool:
        """Whether this forward is of a prompt: the first of a cache, one of many tokens, or before `prompt_end`.

        Where nobody says the end, a prompt goes on until a forward of one token.
        """
        if rows.past == 0 or rows.new >= FEWEST:
            return True
        return self.reading and rows.new > 1 if self.prompt_end is None else rows.past < self.prompt_end

    def evict(self) -> None:
        """End the prompt here: evict what the config's budget leaves out, and free its memory.

        Without this call it happens before the first decoded token: at the first forward after the prompt that
        generate() was given, else at the first one of one token. Does nothing where no prompt was read since, and by a
        score that must be asked (`compress`).

        Raises:
            CacheError: an earlier forward was interrupted, or a score lacks what it needs.
        """
        self.check()
        if self.reading and self.seen:
            self._end_prompt(self.seen)

    def _end_due_prompt(self, rows: Rows, prompt: bool) -> None:
        """End a prompt that was read, and evict where a fixed number of tokens came since the last time."""
        if self.paused or not self.evicts:
            return
        ended = rows.new == 1 or (self.prompt_end is not None and rows.past >= self.prompt_end)
        if (self.reading or self._by_hand(rows)) and not prompt and ended:
            self._end_prompt(rows.past)
        elif self.regular and rows.past and (prompt or rows.new == 1) and self._due(rows.past):
            self._evict()
        self.reading = self.reading or prompt

    def _by_hand(self, rows: Rows) -> bool:
        """Whether all tokens came by `update` alone: a prompt that nobody has announced."""
        if self.scored or not rows.past:
            return False
        stores = [store for _, store in self._evicting if store.spec.rule.moment == "prompt"]
        self.scored = not stores or any(store.judged for store in stores)
        return not self.scored

    def _due(self, seen: int) -> bool:
        return any(store.due(seen) for _, store in self._evicting)

    def _end_prompt(self, seen: int) -> None:
        if not self._waits():
            self._evict()
        self.reading = False  # after it: what a score lacks is refused at every forward that follows
        self.prompt_end = None
        rows = Rows(max(self.batch_size, 1), 0, seen, self.starts)
        for layer in self.own:
            layer.end_prompt(rows)
        self._across(rows)

    def _across(self, rows: Rows) -> None:
        """What the stores of a role do together in all layers."""
        for role in LETTERS:
            stores = [layer.store_of(role) for layer in self.own]
            spec = next((store.spec for store in stores if store is not None), None)
            if spec is None or not spec.by_data:
                continue
            for layer in self.own:
                layer.whole = False
            spec.across(stores, rows)
            for layer in self.own:
                layer.whole = True

    def _waits(self) -> bool:
        """Whether the score must be asked (`compress`); the report says where nobody has."""
        waits = [store for _, store in self._evicting if store.spec.rule.moment == "call"]
        if any(store.cut is None for store in waits) and (state := self._patch_state) is not None:
            state.log.notes.add(WAITS.format(spec_word(waits[0].spec.rule)))
        return bool(waits)

    @cached_property
    def evicts(self) -> bool:
        """Whether the data choose in some store what is left of a prompt where it ends."""
        return any(role.store.by_data for layer in self.own for role in layer.plan.filled)

    @cached_property
    def regular(self) -> bool:
        """Whether some store evicts also after a fixed number of tokens."""
        return any(role.store.every is not None for layer in self.own for role in layer.plan.filled)

    @property
    def _evicting(self) -> list[tuple[LongCtxLayer, EvictedStore]]:
        """The stores of which tokens are evicted by score, each with its layer."""
        return [(layer, store) for layer in self.own for store in layer.evicting]

    def _evict(self) -> None:
        """Score, allot and leave: layer by layer, or all of them together where they share a budget."""
        pairs = self._evicting
        layers = [layer for layer, _ in pairs]
        if not pairs or self.ends is not None:
            return
        rows = Rows(self.batch_size, 0, self.seen, self.starts)
        spec = pairs[0][1].spec
        losses = self.losses() if spec.rule.surprises else None
        with torch.no_grad(), torch.autocast(self.own[0].device.type, enabled=False):
            for layer, store, keep in _kept(pairs, rows, spec, losses):
                for one in layers:
                    one.whole = False  # also where this is interrupted between two layers
                self._leave(layer, store, rows, keep)
        for layer in layers:
            layer.whole = True

    def losses(self) -> Tensor:
        """Surprisal of every slot, float32 ``[B, seen]``; -1 where nothing came before.

        Raises:
            CacheError: the config's score asks for none, or some are not known.
        """
        if self.surprisals is None:
            raise CacheError(
                "score 'surprisal' asks how likely each token was, which is kept where the config names that score. "
                "Set stores.retrieval.rule to {score: surprisal}, and read the text anew."
            )
        self.settle_surprisals()
        if (found := self.surprisals.known(self.seen)) is None:
            raise CacheError(
                "score 'surprisal' asks how likely each token was, and that is not known of all of this cache: tokens "
                "came as inputs_embeds, or their keys were written by hand. Let the model read token ids."
            )
        return found

    @torch.no_grad()
    def settle_surprisals(self) -> None:
        """Run the model's output head over the tokens that wait for it, of a cache whose score asks for surprisal.

        Raises:
            CacheError: the model is gone.
        """
        seen = self.surprisals.end
        if (ids := self.token_ids.known(seen)) is None:
            self.surprisals.crop(0)  # they never will be
        elif self.surprisals.length < seen:
            if (state := self._patch_state) is None:
                raise CacheError(
                    "score 'surprisal': the model that filled this cache is gone. Let it read at least one token with "
                    "this cache first."
                )
            self.surprisals.settle(ids, self.starts, state.losses_of)

    def _leave(self, layer: LongCtxLayer, store: EvictedStore, rows: Rows, keep: Scored) -> None:
        cached = sum(len(one) for heads in keep for one in heads)
        kept = sum(int(one.sum()) for heads in keep for one in heads)
        store.evict(rows, keep)
        layer.forget_choices(store)
        if (state := self._patch_state) is not None:
            state.log.eviction.add(layer.plan.layer_idx, rows.total, cached, kept)

    @property
    def _patch_state(self) -> Any:
        """That of the model, with its report; None where it is gone."""
        return getattr(self.model() if self.model else None, "longctx_state", None)


def tell_prompt(cache: Any, ended: bool) -> None:
    """Tell a cache, if it is a `LongCtxCache`, that what it reads now is a prompt, however short, or that it has ended.

    The next forward after its end evicts, whatever it brings.
    """
    if isinstance(cache, Eviction):
        cache.prompt_end = cache.seen if ended else MOST


def _kept(
    pairs: Sequence[tuple[LongCtxLayer, EvictedStore]], rows: Rows, spec: Evicted, losses: Tensor | None
) -> Iterator[tuple[LongCtxLayer, EvictedStore, Scored]]:
    """Each store with the masks of what it keeps: as soon as it is known."""
    if spec.by == "model":
        scored = [store.scored(rows, losses) for _, store in pairs]
        for pair, keep in zip(pairs, _by_model(scored, rows, spec), strict=True):
            yield *pair, keep
        return
    for at, (layer, store) in enumerate(pairs):
        yield layer, store, _of_layer(store.scored(rows, losses), rows, spec, at, len(pairs))


def _of_layer(scored: Scored, rows: Rows, spec: Evicted, at: int, layers: int) -> Scored:
    keep = []
    for row, heads in enumerate(scored):
        processed = rows.real(row)[1]
        budget = spec.cached_tokens(processed)
        if spec.by == "layer":
            budget = pyramid(budget, spec.sink + spec.recent, processed, layers)[at]
        keep.append(by_head(heads, budget, spec.least) if spec.by == "head" else uniform(heads, budget))
    return keep


def _by_model(scored: Sequence[Scored], rows: Rows, spec: Evicted) -> list[Scored]:
    """By layer, sequence and KV head."""
    by_row = [
        by_model([layer[row] for layer in scored], spec.cached_tokens(rows.real(row)[1]), spec.least)
        for row in range(rows.batch)
    ]
    return [[layers[at] for layers in by_row] for at in range(len(scored))]
