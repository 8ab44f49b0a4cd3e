"""From how many tokens on a cache takes less memory than a dense one: counted as the stores allocate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..stores.base import Reserve, StoreSpec

if TYPE_CHECKING:
    from .cache import LongCtxCache

MOST = 1 << 20  # tokens: what costs more than dense here is said to do so at any length


@dataclass(frozen=True)
class Form:
    """What decides how many bytes a row takes in a cache, at any length.

    Attributes:
        heads: KV heads of all layers, by what says how they keep their tokens.
        head_dim: elements of a key.
        itemsize: bytes of an element.
        reserve: the room of its buffers.
    """

    heads: tuple[tuple[StoreSpec, int], ...]
    head_dim: int
    itemsize: int
    reserve: Reserve

    @classmethod
    def of(cls, cache: LongCtxCache) -> Form:
        """That of a cache that has seen tokens."""
        stores = [store for layer in cache.own for store in layer.stores]
        layer = cache.own[0]
        specs: list[StoreSpec] = []
        for store in stores:
            if store.spec not in specs:  # one with a mapping among its fields has no hash
                specs.append(store.spec)
        heads = [(one, sum(len(store.heads.kv_heads) for store in stores if store.spec == one)) for one in specs]
        slack = max(store.slack for store in stores)
        return cls(tuple(heads), layer.head_dim, layer.dtype.itemsize, Reserve(cache.max_tokens, slack))

    def nbytes(self, tokens: int) -> int:
        """Bytes of a row after a prompt of ``tokens`` tokens, spare room and pages in host memory included."""
        form = (tokens, self.head_dim, self.itemsize, self.reserve)
        return sum(n * sum(spec.nbytes(*form)) for spec, n in self.heads)

    def saves(self, tokens: int) -> bool:
        """Whether that is less than a dense cache takes."""
        return self.nbytes(tokens) < 2 * tokens * self.head_dim * self.itemsize * sum(count for _, count in self.heads)

    @cached_property
    def saves_from(self) -> int | None:
        """Fewest tokens from which on every length takes less than dense; None where none does."""
        most = MOST if self.reserve.max_tokens is None else self.reserve.max_tokens
        if not self.saves(most):
            return None
        # at low it does not, at high it does
        low = 0
        high = most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.saves(middle) else (middle, high)
        # Room grows in steps, so some lengths above that cost more again; over that many tokens steps even out.
        above = range(min(most, low + low // 4 + 2048), low, -1)
        return 1 + next((tokens for tokens in above if not self.saves(tokens)), low)
