"""The base of every prefill pattern, and the one place where the patterns of a layer's heads are run together.

A YAML word of this folder names a frozen dataclass in the file of the same name. Its fields are the YAML keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.blocks import BlockList
from ..layout.heads import RoleHeads

BLOCK = 64  # tokens of a block, the same in every pattern, so that heads with different patterns share one list


class PatternSpec:
    """What a YAML word of ``prefill/`` defines.

    Attributes:
        roles: the roles (``"retrieval"``, ``"streaming"``) whose heads the pattern serves.
        reads_all: the pattern always lists every causal block, so that dense attention computes the same.
        store_rule: its heads run their store's own rule, which is all that streaming heads do so far.
        dense_tail: last tokens of a prompt that read all of it, in heads that run their store's own rule.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    reads_all: ClassVar[bool] = False
    store_rule: ClassVar[bool] = False
    dense_tail: int = 0

    @classmethod
    def select(cls, heads: Sequence[PatternSpec], q: Tensor, k: Tensor, scale: float) -> BlockList:
        """The keys that each query block of each head reads.

        Runs without gradients and in one go for all heads, whose fields may differ. The list of a head depends on that
        head's spec, queries and keys alone, lists the block of every query itself, and is the same in every run: equal
        scores go to the lowest index.

        Args:
            heads: the spec of every query head, all of this class.
            q: queries ``[B, H, T, D]`` of rows that begin at their first real token.
            k: keys ``[B, n, S, D]`` of the same rows; the queries are their last T tokens.
            scale: factor of the scores.

        Raises:
            UnsupportedModeError: the pattern makes no list, its heads run their store's own rule.
        """
        raise UnsupportedModeError(f"{cls.__name__} makes no block list: its heads run their store's own rule.")


@torch.no_grad()
def select(heads: Sequence[PatternSpec], q: Tensor, k: Tensor, scale: float) -> BlockList:
    """The list of every query head of q ``[B, H, T, D]``, whose patterns may differ; k is ``[B, n, S, D]``.

    Each class of patterns runs once, over the KV heads that have a query head of it. Query heads of another class that
    share such a KV head are computed with it and left out.
    """
    group = q.shape[1] // k.shape[1]
    parts = []
    for cls in dict.fromkeys(map(type, heads)):
        mine = [h for h, spec in enumerate(heads) if type(spec) is cls]
        kv_heads = RoleHeads("retrieval", tuple(sorted({h // group for h in mine})), k.shape[1])
        near = [h for n in kv_heads.kv_heads for h in range(n * group, (n + 1) * group)]
        asked = tuple(heads[h if h in mine else mine[0]] for h in near)
        with torch.autocast(q.device.type, enabled=False):  # it would round the scores
            found = cls.select(asked, kv_heads.take(q, group), kv_heads.take(k), scale)
        parts.append((mine, [near.index(h) for h in mine], found))
    return parts[0][2] if len(parts) == 1 else _combine(parts, len(heads))


def _combine(parts: list[tuple[list[int], list[int], BlockList]], total: int) -> BlockList:
    """One list of ``total`` heads from (heads, their places in the list, list)."""
    lists = [found for _, _, found in parts]
    first = lists[0]
    if len({(one.block, one.first, one.kv_len) for one in lists}) > 1:
        raise UnsupportedModeError(
            f"a table mixes patterns with blocks of {sorted({one.block for one in lists})} tokens; every pattern must "
            f"list blocks of {BLOCK}."
        )
    batch, _, query_blocks, _ = first.indices.shape
    width, columns = (max(getattr(one, name).shape[-1] for one in lists) for name in ("indices", "columns"))
    shapes = {
        "indices": (batch, total, query_blocks, width),
        "counts": (batch, total, query_blocks),
        "columns": (batch, total, columns),
        "column_counts": (batch, total),
    }
    out = {name: first.counts.new_zeros(shape) for name, shape in shapes.items()}
    for heads, places, found in parts:
        for name, into in out.items():
            values = getattr(found, name)[:, places]
            if name in ("indices", "columns"):
                into[:, heads, ..., : values.shape[-1]] = values
            else:
                into[:, heads] = values
    return BlockList(first.block, first.first, first.kv_len, **out)
