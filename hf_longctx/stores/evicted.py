"""``store: evicted``: every token while a prompt is read, and of it a budget of tokens, by score, from then on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..config.bounds import SHARE, TOKENS, TOKENS_OR_NONE
from ..config.words import spec_word, word
from ..errors import ConfigError
from ..eviction._budgets import pyramid
from ..eviction._evidence import left_nbytes, state_nbytes
from ..eviction.after.drop import Drop
from ..layout.heads import RoleHeads
from ._evicted import EvictedStore
from .base import Bytes, Reserve, StoreSpec, room

BY = ("uniform", "head", "layer", "model")
FLOOR = 0.2  # AdaKV's, as kvpress has it
# Bytes beside keys and values of what heads keep each for itself: of a token, of its bias, and of a head's part
POSITION = BIAS = 4
PART = 16


@dataclass(frozen=True)
class Budget:
    """Tokens that a KV head keeps of a prompt, the protected ones among them: as many, or a share of the sequence.

    Attributes:
        tokens: how many.
        share: of the tokens that were read so far.
    """

    tokens: int | None = field(default=None, metadata=TOKENS)
    share: float | None = field(default=None, metadata={"above": 0.0, "max": 1.0})

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.share is None):
            raise ConfigError(
                f"tokens: got {self.tokens} with share {self.share}, expected one of the two, null for the other."
            )

    def of(self, processed: int) -> int:
        """The budget of a sequence of ``processed`` tokens; the mean over all heads."""
        return self.tokens if self.share is None else max(1, int(self.share * processed + 1e-6))


@dataclass(frozen=True)
class Evicted(StoreSpec):
    """Cache a prompt whole while it is read; where it ends, keep a budget of its tokens, and all that come after.

    Which tokens stay is a score's choice. Keys keep the rotation they had. A later prompt of the same cache is read
    over what is left, and ends in an eviction of its own. Memory is whole while the prompt is read.

    Attributes:
        rule: the score. Some evict only when `LongCtxCache.compress` is called.
        budget: tokens of each KV head, or their share: `Budget`.
        by: who has the same budget. ``uniform``: every head. ``head``: the heads of a layer share theirs, where the
            scores are highest (AdaKV). ``layer``: every head of a layer, more in early layers (PyramidKV). ``model``:
            all heads of all layers share theirs (KVzip).
        floor: share of its budget that a head has at least, by ``head`` and ``model``; null: 0.2 and 0.
        sink: first tokens of a sequence, which stay.
        recent: newest tokens where the prompt ends, which stay.
        after: what becomes of the others.
        keep: the store of what is left; by ``head`` and ``model`` it is full.
        every: evict also whenever so many tokens came since the last time, pads of the batch among them, in a prompt
            that is read in pieces and while decoding; null: where a prompt ends alone. No drafts can be verified then.
    """

    roles = ("retrieval",)
    exact = False
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"rule": {"score": "key_norm"}, "budget": {"tokens": 12}, "recent": 4, "by": "uniform"},
        {"rule": {"score": "snapkv", "window": 8}, "budget": {"share": 0.5}, "recent": 4},
        {
            "rule": {"score": "key_norm"},
            "budget": {"share": 0.5},
            "recent": 4,
            "by": "layer",
            "keep": {"store": "quantized", "bits": 8, "group": 16, "residual": 0},
        },
        {"rule": {"score": "ems", "window": 8}, "budget": {"share": 0.3}, "by": "model", "after": {"after": "merge"}},
    )

    rule: Any = word("eviction", "score", "retrieval", "snapkv")
    budget: Budget = field(default_factory=lambda: Budget(share=0.5))
    by: str = field(default="head", metadata={"choices": BY})
    floor: float | None = field(default=None, metadata=SHARE)
    sink: int = field(default=4, metadata=TOKENS_OR_NONE)
    recent: int = field(default=64, metadata=TOKENS_OR_NONE)
    after: Any = word("eviction.after", "after", "retrieval", "drop")
    keep: Any = word("stores", "store", "retrieval", "full")
    every: int | None = field(default=None, metadata=TOKENS)

    def __post_init__(self) -> None:
        floored = self.by in ("head", "model")
        if self.floor is not None and not floored:
            raise ConfigError(f"floor: got {self.floor} with by {self.by!r}, whose heads share nothing. Leave it out.")
        if self.rule.alike and floored:
            raise ConfigError(
                f"by: got {self.by!r} with score {spec_word(self.rule)!r}, which gives all heads of a layer the same "
                "scores. What works: uniform, layer."
            )
        if self.rule.moment == "call" and self.every is not None:
            raise ConfigError(
                f"every: got {self.every} with score {spec_word(self.rule)!r}, which evicts when cache.compress() is "
                "called. Leave it out."
            )
        if not self.keep.reads_all or self.keep.by_data:
            raise ConfigError(
                f"keep: got store {spec_word(self.keep)!r}, which does not keep every token as it is. What works: "
                "full, quantized, offloaded, offloaded_disk."
            )
        if self.ragged and spec_word(self.keep) != "full":
            raise ConfigError(
                f"keep: got store {spec_word(self.keep)!r} where heads keep different numbers of tokens (by "
                f"{self.by!r}, after {spec_word(self.after)!r}). Use keep: full, or by: uniform or layer, after: drop."
            )
        least = self.sink + self.recent
        if self.budget.tokens is not None and self.budget.tokens < least:
            raise ConfigError(
                f"budget.tokens: got {self.budget.tokens}, expected at least the {least} of sink and recent (tokens)."
            )

    @property
    def ragged(self) -> bool:
        """Whether what is left is cached head by head: in different numbers, or not as it was."""
        return self.by in ("head", "model") or not isinstance(self.after, Drop)

    @property
    def least(self) -> float:
        """`floor`, or its default."""
        return self.floor if self.floor is not None else FLOOR if self.by == "head" else 0.0

    @property
    def reads_all(self) -> bool:
        return True

    @property
    def alike(self) -> bool:
        return not self.ragged

    @property
    def by_data(self) -> bool:
        return True

    def new(self, heads: RoleHeads, max_tokens: int | None) -> EvictedStore:
        return EvictedStore(self, heads, max_tokens)

    def cached_tokens(self, tokens: int) -> int:
        return min(tokens, max(self.budget.of(tokens), self.sink + self.recent))

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        kept = self.cached_tokens(tokens)
        if self._untouched(tokens):
            return super().capacity(tokens, reserve)
        if self.ragged:
            return kept + self._new(tokens, reserve)
        return self.keep.capacity(kept, self._rest(tokens, reserve))

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        """Once a prompt of so many tokens has ended: the mean over the layers, and by ``head`` over the heads."""
        kept = self.cached_tokens(tokens)
        if self._untouched(tokens):
            return super().nbytes(tokens, head_dim, itemsize, reserve)
        if not self.ragged:
            return self.keep.nbytes(kept, head_dim, itemsize, self._rest(tokens, reserve))
        slot = 2 * head_dim * itemsize
        per_token = slot + POSITION + (BIAS if self.after.biased else 0)
        return Bytes(kept * per_token + PART + self._new(tokens, reserve) * slot)

    def prompt_nbytes(
        self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve, chunk: int, group: int, at: int, layers: int
    ) -> Bytes:
        """As the base has it. What a score needs for a moment, to be made or gathered, is not counted."""
        rule = self.rule
        known = 0
        if rule.queries or rule.gathers:
            queries = min(tokens, rule.queries + reserve.slack)
            known = queries * group * head_dim * itemsize
        most = Bytes(0)
        for before, new in self._fullest(tokens, chunk):
            here = self.in_layer(at, layers, before)
            held = here._held(before, new, head_dim, itemsize, reserve, chunk)
            gathered = here.cached_tokens(before) + new - reserve.slack  # a rollback cuts what is not
            state = known + state_nbytes(rule, gathered, head_dim, group, itemsize)
            most = max(most, held._replace(device=held.device + state), key=sum)
        return most

    @property
    def counted(self) -> bool:
        return self.every is None  # of an eviction within a prompt some heads may not have a whole budget of tokens

    @property
    def queries(self) -> int:
        return self.rule.queries

    def known_nbytes(self, tokens: int, head_dim: int, itemsize: int, group: int) -> int:
        cached = self.cached_tokens(tokens)
        if self.every is None:
            return left_nbytes(self.rule, cached, head_dim, group, itemsize)
        newest = self.rule.queries * group * head_dim * itemsize
        known = state_nbytes if self.rule.gathers else left_nbytes
        return newest + known(self.rule, cached + 1, head_dim, group, itemsize)  # that of decoded tokens as well

    def selectable(self, tokens: int) -> int:
        return self.cached_tokens(tokens)

    def in_layer(self, at: int, layers: int, tokens: int) -> Evicted:
        kept = self.cached_tokens(tokens)
        if self.by != "layer" or kept == tokens:
            return self
        own = pyramid(kept, self.sink + self.recent, tokens, layers)[at]
        return replace(self, by="uniform", budget=Budget(tokens=own))

    def _untouched(self, tokens: int) -> bool:
        """Whether everything stays, and where it is."""
        return self.cached_tokens(tokens) == tokens and spec_word(self.keep) == "full"

    def _rest(self, tokens: int, reserve: Reserve | None) -> Reserve | None:
        """The room of the store of what is left."""
        if reserve is None or reserve.max_tokens is None:
            return reserve
        return replace(reserve, max_tokens=max(1, reserve.max_tokens - tokens + self.cached_tokens(tokens)))

    def _new(self, tokens: int, reserve: Reserve | None, new: int = 1) -> int:
        """Room for new tokens beside what heads keep each for itself, from the first of them on."""
        if reserve is None or reserve.max_tokens == tokens:
            return 0
        return room(new, None if reserve.max_tokens is None else reserve.max_tokens - tokens)

    def _fullest(self, tokens: int, chunk: int) -> list[tuple[int, int]]:
        """When most may be held of a prompt that is read: (tokens up to an eviction, tokens that came after it)."""
        if self.every is None or self.budget.share == 1:
            return [(0, tokens)]
        period = -(-self.every // chunk) * chunk
        first = max(self.sink + self.recent, self.budget.tokens or 0) // period * period + period
        while self._untouched(first):
            first += period
        last = (tokens - 1) // period * period
        ends = [(0, min(first, tokens)), (last - period, period), (last, tokens - last)]
        return [(before, new) for before, new in ends if before >= 0]

    def _held(self, before: int, new: int, head_dim: int, itemsize: int, reserve: Reserve, chunk: int) -> Bytes:
        """Bytes of keys and values when ``new`` tokens came, in chunks, after an eviction at ``before`` tokens."""
        slot = 2 * head_dim * itemsize
        if not before or self._untouched(before):
            return Bytes(slot * _grown(0, before + new, chunk if self.every else new, reserve.max_tokens))
        most = reserve.max_tokens
        if self.ragged:
            left = self.nbytes(before, head_dim, itemsize).device
            return Bytes(left + slot * _grown(0, new, chunk, None if most is None else most - before))
        kept = self.cached_tokens(before)
        rest = self._rest(before, reserve)
        if spec_word(self.keep) == "full":
            return Bytes(slot * _grown(kept, new, chunk, rest.max_tokens))
        return self.keep.nbytes(kept + new, head_dim, itemsize, rest)


def _grown(first: int, new: int, chunk: int, max_tokens: int | None) -> int:
    """Room of a buffer that was made for ``first`` tokens and takes ``new`` ones in chunks."""
    held = first
    found = room(first, max_tokens) if first else 0
    while held < first + new:
        held = min(held + chunk, first + new)
        found = found if held <= found else room(held, max_tokens)
    return found
