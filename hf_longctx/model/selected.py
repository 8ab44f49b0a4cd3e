"""Attention of heads whose decoded tokens read a selection of what is cached, query by query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..cache.plan import RolePlan
from ..decode._selection import Selection
from ..kernels import base as kernels
from ..layout.reads import ALL
from ..layout.scores import Scores
from ..layout.segments import HeadKV, Segment


class SelectedReads:
    """Part of `LayerCall`. Shapes as there; ``b`` sequences that choose together, ``h`` query heads of the role."""

    def _selected(self, q: Tensor, role: RolePlan, part: HeadKV) -> Tensor:
        """What the selection reads, ``[B, h, T, D]``, query by query; zeros for pads."""
        rows = self.rows
        outs = []
        if rows.ends is not None:
            part.selection.part_ways(rows.batch)
        for group, start in self._apart(role):
            out = q.new_zeros(*q[group].shape[:3], part.segments[-1].v.shape[3])
            new, processed = rows.real(group.start or 0)
            if rows.new > 1 and new and not role.decodes(new, processed, rows):  # its prompt, or it is short
                pads = max(0, start - rows.past)
                out[:, :, pads:] = self._by_rule(q[group, :, pads:], part, group, start)
                outs.append(out)
                continue
            for position in range(processed - new, processed):
                at = start + position - rows.past
                own = part.without_last(rows.new - 1 - at).alone(group, start)
                if rows.padded:  # a bias hid the pads, which are gone
                    own = [replace(one, bias=None) if isinstance(one, Segment) else one for one in own]
                one = q[group, :, at : at + 1]
                cached = position - part.gone(group.start or 0)
                out[:, :, at : at + 1] = self._selected_one(one, role, part.selection, group, own, cached)
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _selected_one(
        self, q: Tensor, role: RolePlan, selection: Selection, group: slice, segments: list, position: int
    ) -> Tensor:
        """What one query reads of all cached tokens up to its own, of which ``position`` + 1 are cached."""
        heads = role.heads
        if not role.decode.runs(position + 1):
            return self._attend(q, segments, ALL, heads)
        self._refuse_bias(segments, "a selection cannot choose. Set decode.retrieval to {select: dense}.")
        chosen, reused = selection.choose(group, q, segments, position, self.scores.scale)
        if chosen.note is not None:
            self.forward.log.notes.add(chosen.note)
        self.forward.log.decode.add(*chosen.counted(position), reused)
        if chosen.whole:
            return self._attend(q, segments, ALL, heads)
        own = self.scores.of(heads)
        if chosen.estimate is None:
            return self._attend(q, segments, chosen.blocks(position), heads)
        more = kernels.attend(
            self.plan.word, q, [chosen.estimate], ALL, Scores(own.scale, own.softcap), self.forward, True
        )
        read = kernels.attend(self.plan.word, q, segments, chosen.blocks(position), own, self.forward, True)
        return kernels.merge([read, more])[0]

    def _show_prompt(self, q: Tensor, role: RolePlan, selection: Selection) -> None:
        """Show the selection the queries of prompts."""
        rows = self.rows
        for group, start in self._apart(role):
            new, processed = rows.real(group.start or 0)
            if role.prompts(new, processed, rows):
                first = start + processed - new - rows.past
                selection.saw(group, q[group, :, first : first + new], processed - new, self.scores.scale)

    def _apart(self, role: RolePlan) -> Iterator[tuple[slice, int]]:
        """As `Rows.groups`, but one sequence at a time where each chooses by itself."""
        if not role.decode.by_sequence or self.rows.padded or self.rows.ends is not None:
            return self.rows.groups(by_end=True)
        return ((slice(row, row + 1), 0) for row in range(self.rows.batch))
