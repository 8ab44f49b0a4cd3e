"""One layer's attention in one forward: role by role, by the paths that were decided when the model was patched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..cache.plan import LayerPlan, RolePlan
from ..cache.seam import CACHE
from ..errors import UnsupportedModeError
from ..kernels import base as kernels
from ..layout.dtypes import needs_grad
from ..layout.forward import Forward
from ..layout.heads import RoleHeads
from ..layout.reads import ALL, Reads
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Segment, joined
from ..layout.streamed import Streamed
from ..prefill.base import select
from .observed import CachedRole, Compute
from .selected import SelectedReads

STOCK = "stock"  # the kernel word that means Transformers' own attention call
SLOWLY = "sparse prefill: ran by its slow definition (kernel reference), no faster kernel computes it "
TAIL_OF_A_PART = (
    "dense tail: some prompts were read in several forwards; the last tokens of each read that forward and what was "
    "cached before it, not the whole prompt"
)
UNEVEN = (
    "sparse prefill: prompts that go on after an eviction by head were read densely, because heads have other tokens "
    "from each other"
)
MASK_ROWS = 512  # queries per mask of that call


class LayerCall(SelectedReads):
    """One layer's attention in one forward.

    Shapes: ``B`` sequences, ``H`` query heads of the layer, ``T`` new tokens, ``D`` head_dim.
    """

    def __init__(self, plan: LayerPlan, forward: Forward, scores: Scores):
        self.plan = plan
        self.forward = forward
        self.rows = forward.rows
        self.scores = scores

    def cached(self, query: Tensor, parts: list[HeadKV], by_store: bool = False) -> Tensor:
        """Attention ``[B, H, T, D]`` over what a LongCtxCache holds: ``parts``, one for each role that has heads.

        ``by_store``: by the rules of the stores alone, no pattern or dense tail runs.
        """
        if self.rows.new == 1 and (out := self._in_one_launch(query, parts)) is not None:
            return out.to(query.dtype)
        group = query.shape[1] // self.plan.kv_heads
        outs = []
        for role, part in zip(self.plan.filled, parts, strict=True):
            # A cache filled in another dtype (autocast, model.to) is read in its own.
            q = role.heads.take(query, group).to(part.dtype)
            outs.append(self._role(q, role, part, by_store=by_store))
        return join([part.heads for part in parts], outs, group).to(query.dtype)

    def plain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same attention over the keys and values ``[B, H_kv, S, D]`` of all tokens."""
        group = query.shape[1] // self.plan.kv_heads
        outs = []
        for role in self.plan.filled:
            part = self._all_tokens(role, role.heads, key, value)
            outs.append(self._role(role.heads.take(query, group), role, part, rowwise=True))
        return join([role.heads for role in self.plan.filled], outs, group)

    def observed_cache(self, query: Tensor, parts: list[HeadKV]) -> Tensor | None:
        """`observed` of what a LongCtxCache holds; heads of one role cannot be computed by the rule of the other."""
        cached = tuple(CachedRole(part.heads, part, self.rows) for part in parts)

        def computed(name: str) -> Tensor:
            other = [one for one in cached if one.heads.role != name]
            if other:
                raise UnsupportedModeError(
                    f"compute({name!r}) in layer {self.plan.layer_idx}: its {other[0].heads.role} heads "
                    f"{list(other[0].heads.kv_heads)} keep their own tokens in a LongCtxCache, so the others are gone. "
                    f"Observe with {CACHE}=DynamicCache(), which keeps every token."
                )
            return self.cached(query, parts, by_store=True)

        return self._show(query, cached, cached, computed)

    def observed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
        """Show this layer to the observer; its answer replaces the layer's output. ``compute``: by the stores alone."""
        total = key.shape[1]

        def computed(name: str) -> Tensor:
            role = self.plan.role(name)
            heads = RoleHeads(name, tuple(range(total)), total)
            return self._rowwise(query, role, self._all_tokens(role, heads, key, value))

        return self._show(query, key, value, computed)

    def _show(self, query: Tensor, key: Any, value: Any, computed: Callable[[str], Tensor]) -> Tensor | None:
        compute = Compute(computed, self.scores)
        return self.forward.observer(self.plan.layer_idx, query, key, value, self.scores.scale, self.rows, compute)

    def _attend(self, q: Tensor, segments: Sequence[Segment | Streamed], reads: Reads, heads: RoleHeads) -> Tensor:
        """Attention ``[B, h, T, D]`` of these heads' queries, by the kernel of this case."""
        scores = self.scores.of(heads)
        return kernels.attend(self.plan.word, q, segments, reads, scores, self.forward)[0]

    def _in_one_launch(self, query: Tensor, parts: list[HeadKV]) -> Tensor | None:
        """One decoded token by a kernel that has `attend_layer`; None where it is computed role by role."""
        if not kernels.some_launch_layers(self.plan.word, query.device, self.forward):
            return None
        if self.plan.selecting(self.rows) or any(role.as_stock for role in self.plan.filled):
            return None
        if len({part.dtype for part in parts}) > 1 or any(part.attended is not None for part in parts):
            return None  # two dtypes: autocast was on while one of them grew; or a store asks for the queries
        query = query.to(parts[0].dtype)
        scores = self.scores
        cases = {kernels.case_of(query, part.segments, ALL, scores) for part in parts}
        if len(cases) > 1 or scores.sinks is not None or (case := cases.pop()).kinds:
            return None
        launch = getattr(kernels.choose(self.plan.word, case, self.forward), "attend_layer", None)
        return (
            None
            if launch is None
            else launch(query, [(part.heads.kv_heads, part.segments) for part in parts], scores)[0]
        )

    def _role(self, q: Tensor, role: RolePlan, part: HeadKV, rowwise: bool = False, by_store: bool = False) -> Tensor:
        """Attention ``[B, h, T, D]`` of one role's query heads; the store is shown their queries where it asks."""
        out = self._role_read(q, role, part, rowwise, by_store)
        if part.attended is not None and not by_store:
            scores = self.scores.of(role.heads)
            with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # which would round what it computes
                part.attended(q.detach(), part, self.rows, scores)
        return out

    def _role_read(self, q: Tensor, role: RolePlan, part: HeadKV, rowwise: bool, by_store: bool) -> Tensor:
        if part.selection is not None and not by_store and role.decode.queries:
            self._show_prompt(q, role, part.selection)
        if part.selection is not None and not by_store and role.selecting(self.rows):
            return self._selected(q, role, part)
        patterns = not by_store and self._runs_patterns(role, part)
        if role.as_stock and not patterns and not self.rows.padded and _one_plain(part):
            return self._sdpa(q, *part.segments[0].contents())
        if self.rows.new > 1 or rowwise:
            return self._rowwise(q, role, part, patterns, not by_store)
        return self._attend(q, part.segments, ALL, part.heads)

    def _all_tokens(self, role: RolePlan, heads: RoleHeads, key: Tensor, value: Tensor) -> HeadKV:
        """Another cache's keys; Transformers' own sliding layers give the last ones only, all others every token."""
        first = self.rows.total - key.shape[2]
        if first and not (self.plan.window is not None and first > 0):
            raise UnsupportedModeError(
                f"layer {self.plan.layer_idx} was given {key.shape[2]} keys for {self.rows.total} tokens. A patched "
                "model takes LongCtxCache, DynamicCache, or no cache."
            )
        segment = Segment(heads.take(key), heads.take(value), key.shape[2])
        return HeadKV(heads, [segment], role.store, first=first)

    def _runs_patterns(self, role: RolePlan, part: HeadKV) -> bool:
        """Whether this role's patterns run for some sequence; counts the sequences for which they do not."""
        if role.prefill is None or self.rows.new == 1:
            return False
        if part.uneven:
            self.forward.log.notes.add(UNEVEN)
            return False
        counts = [self.rows.real(sequence) for sequence in range(self.rows.batch)]
        runs = [role.prefill.runs(*count) for count in counts if count[0]]
        self.forward.log.prefill.dense += runs.count(False)
        return any(runs)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Transformers' own call, in pieces of 512 queries where a cached prefix needs a mask."""
        total = k.shape[2]
        new = q.shape[2]
        self.forward.log.used.add(STOCK)
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
        scale = self.scores.scale
        if new in (1, total):
            return sdpa_attention_forward(module, q, k, v, None, scaling=scale)[0].transpose(1, 2)
        slots = torch.arange(total, device=q.device)
        outs = []
        for piece in range(0, new, MASK_ROWS):
            queries = slots[total - new + piece : min(total, total - new + piece + MASK_ROWS)]
            mask = (slots <= queries[:, None])[None, None]
            part = q[:, :, piece : piece + MASK_ROWS]
            outs.append(sdpa_attention_forward(module, part, k, v, mask, scaling=scale)[0])
        return torch.cat(outs, 1).transpose(1, 2)

    def _rowwise(self, q: Tensor, role: RolePlan, part: HeadKV, patterns: bool = False, tails: bool = False) -> Tensor:
        """Sequences of one start at a time, each as if it were alone; the outputs of left pads are zeros."""
        outs = []
        tails = tails and role.dense_tail > 0
        for group, start in self.rows.groups(by_end=patterns or tails):
            pads = min(max(0, start - self.rows.past), self.rows.new)
            alone = q[group, :, pads:]
            real = self.rows.real(group.start or 0)
            if not alone.shape[2]:
                out = torch.zeros_like(alone)
            elif patterns and role.prefill.runs(*real):
                cached = real[1] - part.gone(group.start or 0)
                out = self._sparse(alone, part.alone(group, start), role, real[0], cached)
            elif tails and (tail := role.tail(real[0])):
                out = self._with_tail(alone, part, group, start, real[0], tail)
            else:
                out = self._by_rule(alone, part, group, start)
            outs.append(nn.functional.pad(out, (0, 0, pads, 0)) if pads else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _by_rule(self, q: Tensor, part: HeadKV, group: slice, start: int) -> Tensor:
        """As the store reads."""
        segments, reads = part.spec.reads(part, self.rows, group, start)
        return self._attend(q, segments, reads, part.heads)

    def _with_tail(self, q: Tensor, part: HeadKV, group: slice, start: int, new: int, tail: int) -> Tensor:
        """As the store reads but for the last ``tail`` of ``new`` real queries, ``[B, h, T, D]``; 0 for right pads."""
        self.forward.log.prefill.add_tail(tail, q.shape[0])
        if start < self.rows.past:
            self.forward.log.notes.add(TAIL_OF_A_PART)
        pads = q.shape[2] - new
        spec = part.spec
        outs = []
        if body := new - tail:
            before = (part.without_last(pads + tail), self.rows.without_last(pads + tail))
            outs.append(self._attend(q[:, :, :body], *spec.reads(*before, group, start), part.heads))
        whole = (part.without_last(pads), self.rows.without_last(pads))
        reads = spec.tail_reads(*whole, group, start, tail)
        outs.append(self._attend(q[:, :, body:new], *reads, part.heads))
        # Kernels write [B, T, H, D], as models want it: joined along T there, both copies are sequential.
        out = torch.cat([one.transpose(1, 2) for one in outs], 1).transpose(1, 2) if body else outs[0]
        return nn.functional.pad(out, (0, 0, 0, pads)) if pads else out

    def _sparse(
        self, q: Tensor, segments: list[Segment | Streamed], role: RolePlan, new: int, processed: int
    ) -> Tensor:
        """What the patterns read, ``[B, h, T, D]``: the first ``new`` queries are real, the rest right pads."""
        self._refuse_bias(segments, "a prefill pattern cannot choose. Set prefill.retrieval to {pattern: dense}.")
        k, v = self._together(segments)
        pads = q.shape[2] - new
        q = q[:, :, :new]
        k = k[:, :, :processed]
        v = v[:, :, :processed]
        log = self.forward.log
        blocks = select(role.prefill.patterns, q, k, self.scores.scale)
        reads = blocks.reads
        causal = blocks.causal
        group = q.shape[1] // k.shape[1]
        if role.prefill.share_groups:
            blocks = blocks.share_groups(group)
            log.prefill.add(blocks.reads * group, reads, causal, q.shape[0])
        else:
            log.prefill.add(reads, reads, causal, q.shape[0])
        whole = [Segment(k, v, processed)]
        kernel = kernels.choose(self.plan.word, kernels.case_of(q, whole, blocks, self.scores), self.forward)
        if kernel.NAME == "reference" and self.plan.kernel != "reference":
            why = "with gradients" if needs_grad(q, k, v) else f"in {q.dtype} on {q.device.type}"
            log.notes.add(SLOWLY + why)
        out = self._attend(q, whole, blocks, role.heads)
        return nn.functional.pad(out, (0, 0, 0, pads)) if pads else out

    def _refuse_bias(self, segments: list[Segment | Streamed], said: str) -> None:
        """A store whose keys have a score bias: choosing by the scores of keys alone would leave it out."""
        if any(segment.bias is not None for segment in segments):
            raise UnsupportedModeError(
                f"layer {self.plan.layer_idx}: the store of the retrieval heads gives keys a score bias, among which "
                + said
            )

    def _together(self, segments: list[Segment | Streamed]) -> tuple[Tensor, Tensor]:
        """All keys and values in one piece each, ``[B, n, S, D]``: a pattern chooses among all of them."""
        self.forward.log.notes.update(segment.joined_note for segment in segments if isinstance(segment, Streamed))
        return joined(segments)


def join(heads: Sequence[RoleHeads], outs: list[Tensor], group: int) -> Tensor:
    """The outputs of the roles ``[B, n * group, T, D]`` put back into the order of the layer's heads."""
    if len(outs) == 1:
        return outs[0]
    pieces = []
    for own, out in zip(heads, outs, strict=True):
        done = 0
        for first, end in own.runs:
            pieces.append((first, out[:, done * group : (done + end - first) * group]))
            done += end - first
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda piece: piece[0])], 1)


def _one_plain(part: HeadKV) -> bool:
    """Whether Transformers' own call can read it."""
    first = part.segments[0]
    return len(part.segments) == 1 and isinstance(first, Segment) and first.bias is None
