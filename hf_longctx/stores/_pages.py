"""The segment that reads pages: parts of them, row by row where beams reordered the rows, one block at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.segments import HeadKV, Segment
from ..layout.streamed import Stored
from . import _fetch
from ._page import Folder, HostMemory, Page
from ._saved import SavedSegment, short


class Entry(NamedTuple):
    """A part of a page: its slots ``low .. high``, of the rows ``index [B']`` (int64, on the device; None: all)."""

    page: Page
    low: int
    high: int
    index: Tensor | None = None


@dataclass
class Pages(Stored):
    """Parts of pages that together are slots ``0 .. length`` of the cache.

    Attributes:
        entries: the parts in order.
        device, dtype: of the blocks.
        name: the store's word.
        limit: bytes that `contents` may take; None for no limit.
        bias: of all slots, added to the scores, ``[B, 1, 1, slots]``; None where no row has pads in them.
        padded: slots before which a row may have pads.
        rows: the rows that are read.
        note: what the report says where it is read.
        fetchers: what keeps the buffers of this device alive between two readings.
    """

    saved_as: ClassVar[str] = "Pages"

    entries: list[Entry]
    device: torch.device
    dtype: torch.dtype
    name: str
    limit: int | None = None
    bias: Tensor | None = None
    padded: int = 0
    rows: slice = field(default_factory=lambda: slice(None))
    note: str | None = None
    fetchers: list = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "pages"

    @property
    def joined_note(self) -> str:
        return f"store {self.name}: a prefill pattern on a continued prompt read all pages of a layer at once"

    @property
    def length(self) -> int:
        return sum(entry.high - entry.low for entry in self.entries)

    longest = length

    @property
    def form(self) -> tuple[int, int, int]:
        page, _, _, index = self.entries[0]
        heads, dim = page.form
        rows = range(page.rows if index is None else index.shape[0])
        return len(rows[self.rows]), heads, dim

    @property
    def nbytes(self) -> int:
        """Bytes of the pages, which other caches may share."""
        return sum(entry.page.nbytes for entry in self.entries)

    def blocks(self) -> Iterator[Segment]:
        low = 0
        plain = self._plain()
        for entry in self.entries:
            high = low + entry.high - entry.low
            k, v = (x[:, :, entry.low : entry.high] for x in next(plain))  # nothing else holds the page from here on
            if entry.index is not None:
                k, v = (x.index_select(0, entry.index[self.rows]) for x in (k, v))
            bias = self.bias[..., low:high] if self.bias is not None and low < self.padded else None
            yield Segment(k.to(self.dtype), v.to(self.dtype), high - low, bias)
            low = high

    def _plain(self) -> Iterator[Sequence[Tensor]]:
        """k, v of every entry on the device: of the rows asked for, or of all where an index chooses among them."""
        asked = [(entry.page, self.rows if entry.index is None else slice(None)) for entry in self.entries]
        if (fetcher := _fetch.fetcher(self.device)) is not None:
            self.fetchers[:] = [fetcher]
            yield from fetcher.read(asked)
            return
        for (page, rows), following in itertools.zip_longest(asked, asked[1:]):
            if following is not None:
                following[0].soon()
            yield [x[rows] for x in page.read()]

    def span(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        parts = [block.contents() for block in self._copied(self.first(high).alone(self.rows, low))]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(pair, 2) for pair in zip(*parts, strict=True))

    @staticmethod
    def _copied(pages: Pages) -> Iterator[Segment]:
        """Its blocks; copies where another follows, with which the memory of the first would be used again."""
        last = len(pages.entries) - 1
        for at, block in enumerate(pages.blocks()):
            yield block if at == last else replace(block, k=block.k.clone(), v=block.v.clone())

    def lying(self, slots: Tensor) -> list[Segment] | None:
        if self.device.type != "cpu" or any(entry.index is not None for entry in self.entries):
            return None
        ends = list(itertools.accumulate(entry.high - entry.low for entry in self.entries))
        wanted = torch.bucketize(slots.flatten(), torch.tensor(ends), right=True)
        wanted = torch.bincount(wanted, minlength=len(ends)).tolist()
        batch, heads, dim = self.form
        room = torch.empty((), dtype=self.dtype)
        left = []
        for entry, count in zip(self.entries, wanted, strict=True):
            length = entry.high - entry.low
            if count:
                k, v = (x[self.rows, :, entry.low : entry.high] for x in entry.page.mapped())
            else:
                k = v = room.expand(batch, heads, length, dim)
            if k.dtype != self.dtype:
                return None
            left.append(Segment(k, v, length))
        return left

    def take(self, slots: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Streamed`; pages that hold none of the slots are not touched. Reads ``slots``: a GPU is waited for."""
        flat = slots.cpu().flatten()
        shape = slots.shape
        ends = torch.tensor(list(itertools.accumulate(entry.high - entry.low for entry in self.entries)))
        at = torch.bucketize(flat, ends, right=True)
        if wanted is not None:
            at = at.masked_fill(~wanted.cpu().flatten(), len(self.entries))
        order = at.argsort(stable=True)
        counts = torch.bincount(at, minlength=len(self.entries) + 1).tolist()
        heads = torch.arange(shape[1]).repeat_interleave(shape[2]).repeat(shape[0])
        rows = torch.arange(shape[0]).repeat_interleave(shape[1] * shape[2])
        out = None
        done = 0
        for number, (entry, count) in enumerate(zip(self.entries, counts, strict=False)):
            if not count:
                continue
            some = order[done : done + count]
            done += count
            found = entry.page.read_at(
                self._page_rows(entry)[rows[some]], heads[some], flat[some] - int(ends[number]) + entry.high
            )
            if out is None:
                out = [x.new_zeros(len(flat), x.shape[1]) for x in found]
            for into, x in zip(out, found, strict=True):
                into[some] = x
        if out is None:  # nothing is wanted of it
            heads, dim = self.entries[0].page.form
            out = [torch.zeros(len(flat), dim, dtype=self.dtype) for _ in "kv"]
        return tuple(x.view(*shape, -1).to(self.device, self.dtype) for x in out)

    def _page_rows(self, entry: Entry) -> Tensor:
        """Which rows of the page those that are read are."""
        rows = torch.arange(entry.page.rows) if entry.index is None else entry.index.cpu()
        return rows[self.rows]

    def contents(self) -> tuple[Tensor, Tensor]:
        first = next(self.blocks())
        length = self.length
        # Twice, because they are joined with the new ones next.
        size = 2 * (first.k.nbytes + first.v.nbytes) // first.length * length
        if self.limit is not None and size > self.limit:
            raise UnsupportedModeError(
                f"a prefill pattern chooses among all keys of a layer at once, which takes {size} bytes here; store "
                f"{self.name} may hold {self.limit}. Set prefill.retrieval to {{pattern: dense}}, read the prompt in "
                "one forward, or raise stores.retrieval.resident."
            )
        k, v = (x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (first.k, first.v))
        low = 0
        for block in self.blocks():
            k[:, :, low : low + block.length], v[:, :, low : low + block.length] = block.k, block.v
            low += block.length
        return k, v

    def tensors(self) -> Iterator[Tensor]:
        for entry in self.entries:
            yield from entry.page.tensors()
            if entry.index is not None:
                yield entry.index

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        changed: dict[int | None, Tensor | None] = {}  # entries of one time share one index
        for at, entry in enumerate(self.entries):
            key = None if entry.index is None else id(entry.index)
            if key not in changed:
                rows = torch.arange(entry.page.rows, device=self.device)
                index = change(rows if entry.index is None else entry.index)
                same = self.device.type == "cpu" and torch.equal(index, rows)  # on a GPU that would wait for it
                changed[key] = None if same else index
            self.entries[at] = entry._replace(index=changed[key])

    def copy(self) -> Pages:
        return replace(self, entries=list(self.entries), fetchers=[])

    def saved(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """What `restored` needs: the pages as they are (views), each index once, and which page is read by which."""
        tensors = {}
        numbers = {}
        known = {}
        for at, entry in enumerate(self.entries):
            entry.page.settle()
            k, v = (x[:, :, entry.low : entry.high] for x in entry.page.read())
            tensors |= {f"{at}.k": k, f"{at}.v": v}
            if entry.index is not None:
                numbers[str(at)] = known.setdefault(id(entry.index), len(known))
                tensors[f"index {numbers[str(at)]}"] = entry.index
        return tensors, {"pages": len(self.entries), **numbers}

    @classmethod
    def check(cls, saved: SavedSegment, page: int) -> int:
        """Slots of all pages; CacheError unless `restored` can take them and each holds up to ``page`` of them."""
        numbers = saved.told["numbers"].value
        batch = saved.store.rows.batch
        told = saved.of_kind(cls, *(numbers if isinstance(numbers, dict) else ()))
        if "pages" not in told:
            saved.told["numbers"].refuse("it does not say how many pages there are")
        count = told.pop("pages").number(1, len(saved.store.tensors.shapes))
        if more := told.keys() - set(map(str, range(count))):
            saved.told["numbers"].refuse(f"there is no page {short(min(more))}")
        # rows: fewest of the pages that each index chooses from
        tensors = {}
        rows = []
        slots = 0
        for at in range(count):
            shape = saved.shape(f"{at}.k")
            if len(shape) != 4 or not 1 <= shape[2] <= page:
                saved.told["tensors"].refuse(f"page {at} is {list(shape)}, expected up to {page} tokens")
            known = told[str(at)].number(0, len(rows)) if str(at) in told else None
            held = batch if known is None else shape[0]
            slots = slots + shape[2]
            form = (saved.store.dtype, (held, saved.store.heads, shape[2], saved.store.head_dim))
            tensors |= {f"{at}.k": form, f"{at}.v": form}
            if known is not None:
                tensors[f"index {known}"] = (torch.int64, (batch,))
                rows[known:] = [min([held, *rows[known : known + 1]]), *rows[known + 1 :]]
        saved.holds(tensors)
        for number, held in enumerate(rows):
            low, high = torch.aminmax(saved.read(f"index {number}"))
            if low < 0 or high >= held:
                saved.told["tensors"].refuse(f"index {number} has rows {low} to {high} of {held}")
        return slots

    @classmethod
    def restored(
        cls,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, int],
        device: torch.device,
        *,
        home: HostMemory | Folder,
        name: str,
        limit: int | None,
    ) -> Pages:
        """Those of which `saved` gave ``tensors`` and ``numbers``, written to ``home`` page by page."""
        indices = {key: x.to(device, copy=True) for key, x in tensors.items() if key.startswith("index")}
        entries = []
        for at in range(numbers["pages"]):
            page = home.write(tensors[f"{at}.k"].to(device), tensors[f"{at}.v"].to(device))
            entries.append(Entry(page, 0, page.tokens, indices.get(f"index {numbers.get(str(at))}")))
        return cls(entries, device, tensors["0.k"].dtype, name, limit)

    def first(self, slots: int) -> Pages:
        """The first ``slots`` of them, of the same pages."""
        left = []
        low = 0
        for entry in self.entries:
            high = min(entry.high, entry.low + slots - low)
            if high <= entry.low:
                break
            left.append(entry._replace(high=high))
            low += high - entry.low
        return replace(self, entries=left)

    def alone(self, rows: slice, start: int) -> Pages:
        """Those of ``rows`` from slot ``start`` on."""
        left = []
        low = 0
        for entry in self.entries:
            skipped = max(0, start - low)
            low += entry.high - entry.low
            if start < low:
                left.append(entry._replace(low=entry.low + skipped))
        return replace(self, entries=left, rows=rows, bias=None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "bias": None, "fetchers": []}


@dataclass
class PagedKV(HeadKV):
    """What a store of pages offers: `Pages`, where there are any, and one plain segment."""

    def alone(self, rows: slice, start: int) -> list[Segment | Pages]:
        pages, *plain = self.segments
        if not plain:
            return super().alone(rows, start)
        own = replace(self, segments=plain).alone(rows, max(0, start - pages.length))
        left = pages.alone(rows, start)
        return [left, *own] if left.entries else own
