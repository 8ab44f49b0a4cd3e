"""From how many tokens on a cache takes less memory than a dense one: counted as the stores allocate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ..decode.base import SelectSpec
from ..stores.base import Reserve, StoreSpec

if TYPE_CHECKING:
    from .cache import LongCtxCache

Spec = TypeVar("Spec")
MOST = 1 << 20  # tokens: what costs more than dense here is said to do so at any length


@dataclass(frozen=True)
class Form:
    """What decides how many bytes a row takes in a cache, at any length.

    Attributes:
        heads: KV heads of all layers, by what says how they keep their tokens.
        head_dim: elements of a key.
        itemsize: bytes of an element.
        reserve: the room of its buffers.
        indexed: KV heads that a selection serves, by what says how they keep their tokens, and which of them they read.
        group: query heads of a KV head; 0: not known, and what is known of their queries is not counted.
        evicting: KV heads of each layer of which tokens are evicted.
    """

    heads: tuple[tuple[StoreSpec, int], ...]
    head_dim: int
    itemsize: int
    reserve: Reserve
    indexed: tuple[tuple[StoreSpec, SelectSpec, int], ...] = ()
    group: int = 0
    evicting: tuple[int, ...] = ()

    @classmethod
    def of(cls, cache: LongCtxCache) -> Form:
        """That of a cache that has seen tokens."""
        stores = [store for layer in cache.own for store in layer.stores]
        pairs = [pair for layer in cache.own for pair in zip(layer.stores, layer.selections, strict=True)]
        layer = cache.own[0]
        heads = _counted((store.spec, len(store.heads.kv_heads)) for store in stores)
        served = ((store, one) for store, one in pairs if one is not None)
        indexed = _counted(((store.spec, one.spec), len(store.heads.kv_heads)) for store, one in served)
        reserve = Reserve(cache.max_tokens, max(store.slack for store in stores))
        indexed = tuple((*both, n) for both, n in indexed)
        model = cache.model() if cache.model else None
        group = 0 if model is None else _group(model.config)
        evicting = tuple(len(store.heads.kv_heads) for layer in cache.own for store in layer.evicting)
        return cls(heads, layer.head_dim, layer.dtype.itemsize, reserve, indexed, group, evicting)

    def _by_layer(self, tokens: int) -> Iterator[tuple[StoreSpec, int]]:
        """`heads`, apart where layers keep different numbers of a prompt's tokens."""
        for spec, n in self.heads:
            if spec.by_data and sum(self.evicting) == n:
                layers = len(self.evicting)
                yield from ((spec.in_layer(at, layers, tokens), own) for at, own in enumerate(self.evicting))
            else:
                yield spec, n

    def nbytes(self, tokens: int) -> int:
        """Bytes of a row after a prompt of ``tokens`` tokens, spare room and pages in host memory included.

        Indexes are counted, which are made when the first token is decoded.
        """
        form = (self.head_dim, self.itemsize)
        kept = 0
        for spec, n in self._by_layer(tokens):
            known = spec.known_nbytes(tokens, *form, self.group) if self.group else 0
            kept += n * (sum(spec.nbytes(tokens, *form, self.reserve)) + known)
        room = self.reserve.max_tokens
        return kept + sum(
            n * select.index_bytes(store.selectable(tokens), *form, room) for store, select, n in self.indexed
        )

    def saves(self, tokens: int) -> bool:
        """Whether that is less than a dense cache takes."""
        return self.nbytes(tokens) < 2 * tokens * self.head_dim * self.itemsize * sum(count for _, count in self.heads)

    @cached_property
    def saves_from(self) -> int | None:
        """Fewest tokens from which on every length takes less than dense; None where none does."""
        most = MOST if self.reserve.max_tokens is None else self.reserve.max_tokens
        if not self.saves(most):
            return None
        low = first_where(self.saves, 0, most) - 1
        # Room grows in steps, so some lengths above that cost more again; over that many tokens steps even out.
        above = range(min(most, low + low // 4 + 2048), low, -1)
        return 1 + next((tokens for tokens in above if not self.saves(tokens)), low)


def first_where(holds: Callable[[int], bool], low: int, high: int) -> int:
    """By halves: the first number after ``low`` where ``holds`` is True; False at ``low``, True at ``high``."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _counted(pairs: Iterable[tuple[Spec, int]]) -> tuple[tuple[Spec, int], ...]:
    """How many there are of each; one with a mapping among its fields has no hash."""
    counts: list[tuple[Spec, int]] = []
    for spec, n in pairs:
        at = next((i for i, (one, _) in enumerate(counts) if one == spec), None)
        if at is None:
            counts.append((spec, n))
        else:
            counts[at] = (spec, counts[at][1] + n)
    return tuple(counts)


def _group(config: Any) -> int:
    """Query heads of a KV head."""
    heads = config.num_attention_heads
    return heads // (getattr(config, "num_key_value_heads", None) or heads)
