"""The base of every KV store: segments and state that the cache walks generically, and the two steps a store defines.

A YAML word of this folder names a frozen dataclass (the spec) in the file of the same name. Its fields are the YAML
keys; it knows which roles it serves and makes the store of one layer.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..config.words import spec_word
from ..errors import UnsupportedModeError
from ..layout.heads import RoleHeads
from ..layout.huge_pages import in_huge_pages
from ..layout.reads import CAUSAL, Reads
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Place, Segment
from ..layout.streamed import Streamed
from ._saved import SavedStore

SPARE = 16  # slots: free room that a growing buffer has at least when it is made
SLACK = 255  # tokens that a store which remembers what its windows drop can take back


@dataclass(frozen=True)
class Reserve:
    """What buffers have room for beside what they hold.

    Attributes:
        max_tokens: tokens that the cache has reserved room for; None: it grows by an eighth at a time.
        slack: dropped tokens that it remembers, to roll back; see `Store`.
    """

    max_tokens: int | None = None
    slack: int = SLACK


class Bytes(NamedTuple):
    """Bytes on the device, and in host memory by choice, wherever the device is."""

    device: int
    host: int = 0


class StoreSpec(ABC):
    """What a YAML word of ``stores/`` defines.

    Attributes:
        roles: the roles that it serves.
        rule: which tokens it keeps: ``all`` of them, those at some row positions (``positional``), or those that the
            data choose (``data``).
        places: fields that name a storage location; a saved cache may be loaded with other values.
        exact: what is read is what was written, not rounded.
        estimates: beside tokens something is read that stands for others, such as their mean.
        every: tokens after which something leaves also within a prompt and while decoding; None: nothing does.
        cases: small settings, fields by name, that together show all it does; the tests run each of them.
    """

    roles: tuple[str, ...]
    rule: ClassVar[Literal["all", "positional", "data"]] = "all"
    places: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    estimates: ClassVar[bool] = False
    every: int | None = None
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    @abstractmethod
    def new(self, heads: RoleHeads, max_tokens: int | None) -> Store:
        """An empty store for one layer's ``heads``; ``max_tokens`` reserves a fixed capacity (tokens)."""

    @abstractmethod
    def cached_tokens(self, tokens: int) -> int:
        """Tokens of a sequence of ``tokens`` tokens that one head has cached on the device."""

    @property
    def reads_all(self) -> bool:
        """Whether a new token reads every token before it, as Transformers' own call and prefill patterns take it."""
        return self.rule == "all" and type(self).reads is StoreSpec.reads

    @property
    def alike(self) -> bool:
        """Whether all heads have cached equally many tokens of a sequence, as a decode selection takes it."""
        return True

    @property
    def by_data(self) -> bool:
        """Whether the data choose which tokens it keeps: then nothing else can say what a token reads."""
        return self.rule == "data"

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        """Tokens that the buffers of one head have room for after a forward of ``tokens`` tokens."""
        return room(self.cached_tokens(tokens), reserve.max_tokens)

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        """Bytes of one head of one sequence of ``tokens`` tokens.

        Args:
            head_dim: elements of a key.
            itemsize: bytes of an element.
            reserve: the room of buffers; None counts what is cached alone.
        """
        held = self.cached_tokens(tokens) if reserve is None else self.capacity(tokens, reserve)
        return Bytes(2 * held * head_dim * itemsize)

    def prompt_nbytes(
        self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve, chunk: int, group: int, at: int, layers: int
    ) -> Bytes:
        """Most bytes of one head of one sequence while its prompt of ``tokens`` tokens is read.

        More than `nbytes` where tokens leave when the prompt has ended, what is known of queries until then included.

        Args:
            chunk: tokens of the prompt per forward.
            group: query heads of a KV head.
            at, layers: as for `in_layer`.
        """
        return self.nbytes(tokens, head_dim, itemsize, reserve)

    @property
    def counted(self) -> bool:
        """Whether lengths alone say how many bytes it takes; else they say how many at most."""
        return True

    @property
    def queries(self) -> int:
        """Last queries of a prompt that say what it keeps."""
        return 0

    def known_nbytes(self, tokens: int, head_dim: int, itemsize: int, group: int) -> int:
        """Bytes that one head keeps beside keys and values once its prompt has ended; see `prompt_nbytes`."""
        return 0

    def selectable(self, tokens: int) -> int:
        """Tokens among which a selection chooses once a prompt of ``tokens`` tokens has ended."""
        return tokens

    def in_layer(self, at: int, layers: int, tokens: int) -> StoreSpec:
        """What it is in one of several layers, where they keep different numbers of a prompt's tokens.

        Args:
            at: which of the layers that have such a store.
            layers: how many do.
        """
        return self

    def reads(self, part: HeadKV, rows: Rows, group: slice, start: int) -> tuple[list[Segment | Streamed], Reads]:
        """What the new tokens of the sequences ``group`` read by the visibility rule, as if those were alone.

        Args:
            part: what the store's `append` returned, or the keys and values of all tokens in one segment.
            group: sequences that all start at the padded position ``start``; their queries begin at a real token.
        """
        return part.alone(group, start), CAUSAL

    def across(self, stores: Sequence[Store | None], rows: Rows) -> None:  # noqa: B027
        """What the stores of all layers do together where a prompt has ended, after each had its `Store.end_prompt`.

        Args:
            stores: of one role in every attention layer of the model, in order; None where a layer has no such heads.
            rows: all that was seen.
        """

    @classmethod
    def has_tail_reads(cls) -> bool:
        """Whether the store says what a dense tail reads: `tail_reads`, anew where a class has `reads` of its own."""
        nearest = next(one for one in cls.__mro__ if {"reads", "tail_reads"} & vars(one).keys())
        return nearest is not StoreSpec and "tail_reads" in vars(nearest)

    def tail_reads(
        self, part: HeadKV, rows: Rows, group: slice, start: int, queries: int
    ) -> tuple[list[Segment | Streamed], Reads]:
        """What the last ``queries`` of the new tokens read where they read densely; arguments as for `reads`.

        Of the tokens before this forward what the first new token reads by the visibility rule, and of the new ones
        all up to the query. For streaming stores; without it a config's ``dense_tail`` is refused.
        """
        raise NotImplementedError

    def shown(self, part: HeadKV, rows: Rows, row: int) -> tuple[list[Segment | Streamed], Tensor]:
        """What one sequence still has, without pads on its left: segments ``[1, n, S', D]``, each token's row position.

        Args:
            part: what the store's `append` returned.
            row: index of the sequence in the batch.
        """
        start = rows.start(row)
        return part.alone(slice(row, row + 1), start), torch.arange(rows.total - start)


class Store(ABC):
    """The KV of one role's heads in one layer, for all rows of the batch.

    Attributes:
        kinds: classes of what ``segments`` holds, for `restored`.
        numbers: names of the attributes (plain ints) that belong to what is kept.
        parts: what else its plain data has (`saved`), beside segments, state and numbers.
        staggers: whether it has `stagger`.
        slack: tokens that left a window and are remembered, so that `crop` can take them back: `SLACK` or 0. From 0 it
            may be set to `SLACK` at any time, for what leaves from then on.
    """

    kinds: ClassVar[tuple[type[Segment] | type[Streamed], ...]] = (Segment,)
    numbers: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    staggers: ClassVar[bool] = False
    slack: int = SLACK

    def __init__(self, spec: StoreSpec, heads: RoleHeads, max_tokens: int | None):
        self.spec = spec
        self.heads = heads
        self.max_tokens = max_tokens
        self.segments: dict[str, Segment | Streamed] = {}
        self.state: dict[str, Tensor] = {}

    @property
    def note(self) -> str | None:
        """What the report says of how it keeps its tokens; None for nothing."""
        return None

    def prepare(self, k: Tensor, v: Tensor, rows: Rows) -> None:  # noqa: B027
        """What can fail of the `append` with the same arguments that follows; of what is kept it changes nothing."""

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        """Keep what this forward brings and return what its queries read.

        Args:
            k, v: keys and values of *all* the layer's KV heads, ``[B, H_kv, T, D]``.
            rows: the rows of this forward.
        """

    def attended(self, q: Tensor, part: HeadKV, rows: Rows, scores: Scores) -> None:  # noqa: B027
        """The queries of a forward, after their attention; what was cached does not change here.

        Asked where `append` put this method into ``part.attended``.

        Args:
            q: of the role's heads, ``[B, h, T, D]``, rotated as the keys are.
            part: what `append` returned.
            scores: how attention made scores of them, of these heads.
        """

    def end_prompt(self, rows: Rows) -> None:  # noqa: B027
        """A prompt has ended: the next forward brings decoded tokens. ``rows`` are all that was seen.

        Asked before any layer of that forward writes, once per prompt; for stores in which the data choose.
        """

    def geometry(self, rows: Rows) -> Rows:
        """The rows as if the tokens that are not cached any more had never been seen."""
        return rows

    def held(self, rows: Rows) -> HeadKV:
        """What it would show a forward that follows, which brings nothing; ``rows`` are all that was seen."""
        raise UnsupportedModeError(
            f"store {spec_word(self.spec)} of the {self.heads.role} heads does not say what it holds between forwards "
            "(held), which this selection needs. Use stores.retrieval: {store: full}."
        )

    def place(self, rows: Rows) -> Place | None:
        """Where the one new token of every sequence goes, which the caller writes next; None where that is not all.

        ``rows`` have no pads. What is dropped for the token is remembered first. An `append` of the same forward may
        follow instead, when another role of the layer has no such place.
        """
        return None

    def shown(self, segments: list[Segment], before: Streamed | None = None) -> HeadKV:
        """What a token reads that was written to a `place`: these segments, after what lies ``before`` them."""
        return HeadKV(self.heads, segments, self.spec, state=self.state)

    @classmethod
    def has_place(cls) -> bool:
        """Whether `place` says what `append` does: it is defined anew where a class has an `append` of its own."""
        return "place" in vars(next(one for one in cls.__mro__ if {"append", "place"} & vars(one).keys()))

    @abstractmethod
    def crop(self, rows: Rows, target: int) -> None:
        """Forget all but the first ``target`` slots of ``rows`` (whose ``total`` is what was seen)."""

    def oldest_crop(self, total: int) -> int:
        """Smallest slot count that ``crop`` can still go back to after ``total`` slots."""
        return 0

    def stagger(self, rows: Rows, pads: Sequence[int]) -> None:
        """Take the last ``pads[i]`` tokens of row i back and put as many pads before its first, without moving others.

        ``rows``, whose ``total`` is what was seen, have no pads yet.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything, memory included."""
        self.segments.clear()
        self.state.clear()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor with a batch dimension by ``change(tensor)`` (reorder, repeat, select)."""
        with torch.inference_mode(False):  # as in new_segment
            for segment in self.segments.values():
                segment.map_rows(change)
            self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def fork(self) -> Store:
        """A store that goes on from here by itself, without copying what neither of the two will write again."""
        other = copy.copy(self)
        with torch.inference_mode(False):  # as in new_segment
            other.segments = {name: segment.copy() for name, segment in self.segments.items()}
            other.state = {name: tensor.clone() for name, tensor in self.state.items()}
        return other

    def filled(self, rows: Rows) -> dict[str, Segment | Streamed]:
        """The segments, without memory that nobody wrote before their length (`blanked`): what `saved` writes.

        ``rows`` are all that was seen, as for `crop`.
        """
        return self.segments

    def saved(self, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` needs: tensors by name (views where possible), and plain data that JSON can hold."""
        tensors = {f"state.{name}": tensor for name, tensor in self.state.items()}
        parts = []
        for name, segment in self.filled(rows).items():
            kept, numbers = segment.saved()
            tensors |= {f"segments.{name}.{key}": tensor for key, tensor in kept.items()}
            parts.append({"name": name, "kind": segment.saved_as, "tensors": list(kept), "numbers": numbers})
        numbers = {name: getattr(self, name) for name in self.numbers}
        return tensors, {"segments": parts, "state": list(self.state), "numbers": numbers}

    @abstractmethod
    def check(self, saved: SavedStore) -> None:
        """Raise CacheError unless ``saved`` can be what `saved` gave of such a store: a file is believed in nothing.

        States the names, kinds and lengths of the segments, which numbers may be what, and the state, all from what was
        seen (``saved.rows``); what it does not speak of is refused. What `restore` makes is used without another check,
        by kernels that read where they are told to.
        """

    def restore(self, read: Callable[[str], Tensor], plain: Mapping[str, Any], device: torch.device) -> None:
        """Fill this empty store with what `saved` gave, each tensor as ``read(name)`` gives it, onto ``device``."""
        with torch.inference_mode(False):  # as in new_segment
            for part in plain["segments"]:
                tensors = {key: read(f"segments.{part['name']}.{key}") for key in part["tensors"]}
                self.segments[part["name"]] = self.restored(part["kind"], tensors, part["numbers"], device)
            self.state |= {name: read(f"state.{name}").to(device, copy=True) for name in plain["state"]}
        for name in self.numbers:
            setattr(self, name, plain["numbers"][name])

    def restored(
        self, kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], device: torch.device
    ) -> Segment | Streamed:
        """One of `segments`, of the class named ``kind``; a store whose classes need more than that overrides it.

        A buffer gets the room it had, but where nothing was reserved at most twice what the store would make for as
        many tokens and those that may have been taken back: a file may ask for any.
        """
        if kind == Segment.saved_as and self.max_tokens is None:
            numbers = {**numbers, "capacity": min(numbers["capacity"], 2 * room(tensors["k"].shape[2] + SLACK, None))}
        return {known.saved_as: known for known in self.kinds}[kind].restored(tensors, numbers, device)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the store keeps alive."""
        for segment in self.segments.values():
            yield from segment.tensors()
        yield from self.state.values()

    def offloaded(self) -> dict[str, int]:
        """Bytes kept outside of the device by choice, by where they are."""
        return {}

    def new_segment(self, k: Tensor, v: Tensor, capacity: int) -> Segment:
        """An empty segment for this store's heads, like ``k`` and ``v`` in batch, head_dim, dtype and device."""
        batch = k.shape[0]
        n = len(self.heads.kv_heads)
        with torch.inference_mode(False):  # so that the cache can be continued outside of inference mode
            made = (in_huge_pages(x.new_empty(batch, n, capacity, x.shape[3])) for x in (k, v))
            return Segment(*made, 0)

    def grow(self, name: str, k: Tensor, v: Tensor, needed: int, limit: int | None = None) -> Segment:
        """The segment ``name`` with room for ``needed`` slots, at most ``limit``, and never for many more.

        It stays in the dtype it was made in: what is kept is not rounded where autocast was switched on since.
        """
        segment = self.segments.get(name)
        capacity = room(needed, self.max_tokens, limit)
        if segment is not None and needed <= segment.k.shape[2] <= capacity:
            return segment
        grown = (
            self.new_segment(k, v, capacity) if segment is None else self.new_segment(segment.k, segment.v, capacity)
        )
        if segment is not None:
            grown.length = segment.length
            grown.k[:, :, : segment.length] = segment.k[:, :, : segment.length]
            grown.v[:, :, : segment.length] = segment.v[:, :, : segment.length]
        self.segments[name] = grown
        return grown

    def incoming(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """This store's heads of a forward's new keys and values, differentiable."""
        return self.heads.take(k), self.heads.take(v)


def window_positions(segments: Sequence[Segment], first: int) -> Tensor:
    """Row positions of the tokens of sinks, which begin at 0, and of a band that begins at ``first``."""
    sinks, band = (segment.length for segment in segments)
    return torch.cat([torch.arange(sinks), torch.arange(first, first + band)])


def blanked(segment: Segment, held: list[tuple[slice, int]]) -> Segment:
    """The segment, or a copy with zeros after the filled slots of each row: ``held`` are (rows, how many)."""
    if all(count >= segment.longest for _, count in held):
        return segment
    blank = replace(segment, k=torch.zeros_like(segment.k), v=torch.zeros_like(segment.v))
    for rows, count in held:
        blank.k[rows, :, :count], blank.v[rows, :, :count] = segment.k[rows, :, :count], segment.v[rows, :, :count]
    return blank


def spare(needed: int) -> int:
    """Free slots of a new buffer for ``needed`` slots: an eighth of them, so that a token is copied 9 times at most.

    That is the mean over all tokens of a buffer that grows by one at a time: the buffers before the last one form a
    geometric series.
    """
    return max(SPARE, needed // 8)


def room(needed: int, max_tokens: int | None, limit: int | None = None) -> int:
    """Slots of a new buffer: ``needed`` and spare ones, or what ``max_tokens`` reserves; at most ``limit``."""
    capacity = needed + spare(needed) if max_tokens is None else max_tokens
    return max(needed, capacity if limit is None else min(capacity, limit))
