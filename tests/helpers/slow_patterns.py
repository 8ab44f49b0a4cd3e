"""Vertical-slash as loops in Python, and a stock model that runs it as an explicit mask. Nothing of the library's."""

from __future__ import annotations

import torch

from helpers.tiny import DenseMask, dense_mask_visible
from hf_longctx.kernels import reference

BLOCK = 64


def line_sums(q, k, scale) -> tuple[list[float], list[float]]:
    """One head's q ``[T, D]`` and k ``[S, D]``: weights of the last 64 queries summed per key and per offset."""
    size, last = len(k), min(64, len(q))
    columns, offsets = [torch.zeros(size, dtype=torch.float64) for _ in range(2)]
    for back in range(last):
        p = size - last + back
        weights = (k[: p + 1] @ q[len(q) - last + back] * scale).softmax(0)
        columns[: p + 1] += weights
        offsets[: p + 1] += weights.flip(0)  # key j is p - j away
    return columns.tolist(), offsets.tolist()


def best(sums: list[float], budget: int) -> set[int]:
    return set(sorted(range(len(sums)), key=lambda j: (-sums[j], j))[:budget])


def vertical_slash(q, k, scale, vertical: int, slash: int) -> tuple[list[set[int]], set[int]]:
    """Key blocks of every query block that the T queries touch, and columns, of one head."""
    size, first = len(k), len(k) - len(q)
    by_column, by_offset = line_sums(q, k, scale)
    offsets = best(by_offset, slash) | set(range(64))
    listed = []
    for block in range(first // BLOCK, (size - 1) // BLOCK + 1):
        found = {0}
        for position in range(block * BLOCK, (block + 1) * BLOCK):
            found |= {(position - o) // BLOCK for o in offsets if o <= position}
        listed.append({b for b in found if b * BLOCK < size})
    return listed, best(by_column, vertical)


def mask_of(listed: list[set[int]], columns: set[int], q_len: int, size: int) -> torch.Tensor:
    """Bool ``[T, S]``, key by key from the rule."""
    first, rows = size - q_len, []
    for t in range(first, size):
        block = t // BLOCK
        if t == first or t % BLOCK == 0:
            own = listed[block - first // BLOCK]
            reads = torch.tensor([j // BLOCK in own or (j in columns and j < block * BLOCK) for j in range(size)])
        rows.append(reads & (torch.arange(size) <= t))
    return torch.stack(rows)


def pattern_mask(q, k, scale, budgets) -> torch.Tensor:
    """Bool ``[H, T, S]`` of one row's q ``[H, T, D]`` and k ``[n, S, D]``; a head's budget is (vertical, slash)."""
    group, masks = len(q) // len(k), []
    for head, budget in enumerate(budgets):
        if budget is None:
            masks.append(reference.causal_visible(q.shape[1], k.shape[1]))
        else:
            lists = vertical_slash(q[head], k[head // group], scale, *budget)
            masks.append(mask_of(*lists, q.shape[1], k.shape[1]))
    return torch.stack(masks)


class PatternMask(DenseMask):
    """A stock model whose retrieval heads read the vertical-slash mask where the prefill rule says so."""

    def __init__(self, model, config, budgets, min_tokens: int = 0, share: bool = False):
        super().__init__(model, config)
        self.budgets, self.min_tokens, self.share, self.ran = budgets, min_tokens, share, 0

    def attend(self, module, q, k, v, mask, scaling=None, **kwargs):
        (batch, heads, new, _), total = q.shape, k.shape[2]
        real = torch.ones(batch, total, dtype=torch.bool) if mask is None else mask.bool()
        starts = [int(row.long().argmax()) if row.any() else total for row in real]
        ends = [int(start + row.sum()) for start, row in zip(starts, real, strict=True)]
        roles, group = self.roles[module.layer_idx], heads // k.shape[1]
        visible = dense_mask_visible(roles, group, starts, new, total, self.sink, self.recent)
        reads = torch.tensor([role == "R" for role in roles for _ in range(group)])
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            low = max(start, total - new)
            if end - low >= 128 and end - start >= self.min_tokens:
                into, queries, keys = low - (total - new), slice(low - (total - new), end - (total - new)), k[row]
                with torch.no_grad():
                    found = pattern_mask(
                        q[row, :, queries], keys[:, start:end], scaling, self.budgets(module.layer_idx, heads)
                    )
                if self.share:
                    found = found.unflatten(0, (-1, group)).any(1).repeat_interleave(group, 0)
                visible[row, reads, into : into + end - low, start:end] = found[reads]
                self.ran += 1
        out, _ = reference.attention(q, k, v, visible, scaling)
        return out.transpose(1, 2).contiguous(), None
