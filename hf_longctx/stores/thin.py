"""``store: thin``: every token; once a prompt has ended, its keys without the channels that its queries need least."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import TOKENS, TOKENS_OR_NONE
from ..layout.gather import key_pieces, spans
from ..layout.heads import RoleHeads
from ..layout.rows import Rows
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Segment, one_row
from ..layout.thinned import Thinned
from ._pieces import PiecesStore
from ._saved import SavedSegment, SavedStore
from .base import SLACK, Bytes, Reserve, StoreSpec, room


@dataclass(frozen=True)
class Thin(StoreSpec):
    """Cache every token, the keys of a prompt without the channels that its queries need least.

    ThinK, arXiv:2407.21018. A prompt is read as `full` reads it. Where it ends, each KV head drops the channels with
    the lowest mean square of the last queries (over the query heads of the KV head, too) times mean square of the keys.
    The newest keys and all that come later keep every channel; values are not touched. The channels are chosen where
    the first prompt of more than ``recent`` tokens ends. A later prompt loses the same ones where it ends.

    Attributes:
        ratio: share of the channels of a key that are dropped, rounded down.
        window: last queries of the prompt that say what is needed.
        recent: newest keys of the prompt that keep every channel.
    """

    roles = ("retrieval",)
    rule = "data"
    exact = False
    cases = ({"ratio": 0.5, "window": 8, "recent": 6},)

    ratio: float = field(default=0.4, metadata={"min": 0.0, "max": 0.9})
    window: int = field(default=32, metadata={**TOKENS, "max": 4096})
    recent: int = field(default=32, metadata=TOKENS_OR_NONE)

    def new(self, heads: RoleHeads, max_tokens: int | None) -> ThinStore:
        return ThinStore(self, heads, max_tokens)

    @property
    def reads_all(self) -> bool:
        return True  # of its channels

    def kept(self, head_dim: int) -> int:
        """Channels that a thinned key still has."""
        return head_dim - int(head_dim * self.ratio + 1e-9)

    def cached_tokens(self, tokens: int) -> int:
        return tokens

    def capacity(self, tokens: int, reserve: Reserve) -> int:
        return sum(self._capacities(tokens, reserve))

    def _capacities(self, tokens: int, reserve: Reserve | None) -> tuple[int, int]:
        """Tokens with whole keys, and with thinned ones, where a prompt of so many has ended."""
        thin = max(0, tokens - self.recent) if self.ratio else 0
        if reserve is None:
            return tokens - thin, thin
        most = reserve.max_tokens
        return room(tokens - thin, most, None if most is None else most - thin), thin

    def nbytes(self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve | None = None) -> Bytes:
        kept = self.kept(head_dim)
        if kept == head_dim:
            return super().nbytes(tokens, head_dim, itemsize, reserve)
        whole, thin = self._capacities(tokens, reserve)
        listed = kept * torch.int64.itemsize if thin else 0
        return Bytes(2 * whole * head_dim * itemsize + thin * (kept + head_dim) * itemsize + listed)

    def prompt_nbytes(
        self, tokens: int, head_dim: int, itemsize: int, reserve: Reserve, chunk: int, group: int, at: int, layers: int
    ) -> Bytes:
        if self.kept(head_dim) == head_dim:
            return self.nbytes(tokens, head_dim, itemsize, reserve)
        wide = max(itemsize, torch.float32.itemsize)
        queries = min(tokens, self.window + reserve.slack) * head_dim * wide
        return Bytes(2 * room(tokens, reserve.max_tokens) * head_dim * itemsize + queries)

    @property
    def queries(self) -> int:
        return self.window


class ThinStore(PiecesStore):
    """A piece is thinned; the newest ``recent`` slots of a prompt are not in one.

    Attributes:
        first, asked: slots of the queries in the state ``energy``: of the last queries of a prompt that is being read,
            so many as choose, and those that may be taken back, the squares of each channel, ``[B, n, W, D]``.
    """

    kinds = (Segment, Thinned)
    numbers: ClassVar[tuple[str, ...]] = ("first", "asked")
    word = "thin"

    def __init__(self, spec: Thin, heads: RoleHeads, max_tokens: int | None):
        super().__init__(spec, heads, max_tokens)
        self._know({}, 0)

    def _know(self, state: dict[str, Tensor], asked: int) -> None:
        """Have these queries, which end at the slot ``asked``."""
        self.state = state
        self.asked = asked if state else 0
        self.first = self.asked - (state["energy"].shape[2] if state else 0)

    def append(self, k: Tensor, v: Tensor, rows: Rows) -> HeadKV:
        part = super().append(k, v, rows)
        if self._asks(rows, k.shape[3]):
            part.attended = self.attended
        return part

    def _asks(self, rows: Rows, head_dim: int) -> bool:
        """Whether the queries of this forward may choose channels: of a prompt, while some sequence has none chosen."""
        if self.spec.kept(head_dim) == head_dim or self.past > max(rows.starts or (0,)):
            return False
        return rows.new > 1 or rows.past == 0 or "energy" in self.state

    @torch.no_grad()
    def attended(self, q: Tensor, part: HeadKV, rows: Rows, scores: Scores) -> None:
        if rows.ends is not None:
            return  # right pads: such a cache cannot be continued
        most = self.spec.window + self.slack
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.inference_mode(False):  # as in new_segment
            energy = q[:, :, -most:].to(wide).square().unflatten(1, (len(self.heads.kv_heads), -1)).mean(2)
            if "energy" in self.state and self.asked == rows.past:
                energy = torch.cat([self.state["energy"].to(wide), energy], 2)[:, :, -most:]
        self._know({"energy": energy}, rows.total)

    @torch.no_grad()
    def end_prompt(self, rows: Rows) -> None:
        done = self.past
        end = rows.total - self.spec.recent
        plain = self.plain
        if end > done and self.spec.kept(plain[0].k.shape[3]) < plain[0].k.shape[3]:
            with torch.inference_mode(False), torch.autocast(plain[0].k.device.type, enabled=False):
                segments = self._thin(plain, self._channels(plain, rows, done), rows, done, end)
            self.segments = segments  # at once, also where it was interrupted
        self._know({}, 0)

    def _thin(self, plain: list[Segment], channels: Tensor, rows: Rows, done: int, end: int) -> dict:
        """The segments when the slots ``done .. end``, the first of ``plain``, are thinned to ``channels``."""
        pieces = dict(self.pieces)
        keys, values = zip(*spans(plain, 0, end - done), strict=True)
        k = torch.cat([k.gather(3, channels[:, :, None].expand(-1, -1, k.shape[2], -1)) for k in keys], 2)
        v = torch.cat(values, 2)
        name = f"thin {len(pieces)}"
        last, piece = next(reversed(pieces.items()), (None, None))
        if last and not piece.shared and not (one_row(piece.k) and rows.batch > 1):  # nobody else reads it
            name, k, v = last, torch.cat([piece.k, k], 2), torch.cat([piece.v, v], 2)
        pieces[name] = Thinned(k, v, channels, plain[0].k.shape[3])
        return {**pieces, "kept": self._kept(plain, done, end, rows.total)}

    def _channels(self, plain: list[Segment], rows: Rows, done: int) -> Tensor:
        """The channels that thinned keys keep, int64 ``[B, n, D']``: sequences that chose theirs stay with them."""
        chosen = [piece.channels for piece in self.pieces.values()][-1:]
        kept = self.spec.kept(plain[0].k.shape[3])
        found = []
        for group, start in rows.groups():
            if start < done:
                found.append(chosen[0][group])
                continue
            own = HeadKV(self.heads, plain, self.spec).alone(group, start - done)
            need = self._need(own, plain[0].k[group], group, start)
            found.append(need.sort(dim=2, descending=True, stable=True).indices[..., :kept].sort(2).values)
        return torch.cat(found)

    def _need(self, own: list[Segment], like: Tensor, group: slice, start: int) -> Tensor:
        """How much each channel adds to scores, ``[b, n, D]``, of the sequences ``group``.

        Where no query is known the keys alone say it: they were written by hand, or all queries were taken back.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        need = like.new_zeros(*like.shape[:2], like.shape[3], dtype=wide)
        tokens = sum(segment.length for segment in own)
        if tokens:
            for _, keys in key_pieces(own, 0, tokens):
                need += keys.to(wide).square().sum(2)
        need /= max(1, tokens)
        if "energy" in self.state:
            low = max(start, self.first, self.asked - self.spec.window)
            energy = self.state["energy"][group, :, low - self.first :]
            if energy.shape[2]:
                need *= energy.mean(2)
        return need

    def crop(self, rows: Rows, target: int) -> None:
        super().crop(rows, target)
        if "energy" in self.state and target < self.asked:
            left = max(0, target - self.first)
            self._know({"energy": self.state["energy"][:, :, :left]} if left else {}, target)

    def oldest_crop(self, total: int) -> int:
        """Where the last prompt ended that was thinned."""
        return self.past + self.spec.recent if self.pieces else 0

    def reset(self) -> None:
        super().reset()
        self._know({}, 0)

    def check(self, saved: SavedStore) -> None:
        pieces, parts = self._check_pieces(saved, Thinned)
        slots = 0
        for piece in pieces:
            slots += self._check_piece(piece, saved.rows.total - self.spec.recent - slots)
        list(self._check_parts(saved, parts, len(pieces), slots))
        known = saved.shape("energy") != ()
        asked = saved.number("asked", int(known), saved.rows.total if known else 0)
        first = saved.number("first", max(0, asked - self.spec.window - SLACK), asked - known)
        form = {"energy": (saved.rows.batch, saved.heads, asked - first, saved.head_dim)} if known else {}
        saved.state(torch.promote_types(saved.dtype, torch.float32), **form)

    def _check_piece(self, piece: SavedSegment, most: int) -> int:
        """Slots of a piece, at most ``most``."""
        told = piece.of_kind(Thinned, "rows", "dim", "shared")
        slots, batch = self._slots(piece, "k", most)
        store = piece.store
        dim = told["dim"].number(store.head_dim, store.head_dim)
        told["rows"].number(store.rows.batch, store.rows.batch)
        told["shared"].number(0, 1)
        kept = self.spec.kept(dim)
        heads = (batch, store.heads)
        form = {"k": (store.dtype, (*heads, slots, kept)), "v": (store.dtype, (*heads, slots, dim))}
        piece.holds({**form, "channels": (torch.int64, (*heads, kept))})
        channels = piece.read("channels")
        ascending = bool((channels.diff(dim=2) > 0).all()) and kept < dim
        if not ascending or channels.min() < 0 or channels.max() >= dim:
            piece.told["tensors"].refuse(f"channels are not {kept} ascending ones of {dim}")
        return slots
