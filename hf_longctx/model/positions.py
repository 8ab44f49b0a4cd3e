"""The position_ids of a forward: a patched model counts the tokens of a row itself, and refuses other positions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedModeError
from ..layout.rows import Rows


def refuse_positions(position_ids: Tensor | None, rows: Rows, staggered: bool = False) -> None:
    """Refuse positions that do not count on by one among the real tokens of a row.

    Args:
        position_ids: ``[B or 1, T]``, or of a multimodal model, which has several for each token, ``[n, B, T]``.
        staggered: of the cache.

    Raises:
        UnsupportedModeError: they go back, which Transformers reads as packed sequences, or skip or repeat; or a
            multimodal model counted them over a cache that was staggered, whose pads it takes for tokens.
    """
    if staggered and position_ids is not None and position_ids.dim() > 2:
        raise UnsupportedModeError(
            "this model has several positions for each token and counts them from the length of the cache, in which "
            "staggered sequences have pads: the positions would be wrong. Read texts of one length together, or each "
            "with a cache of its own (fork)."
        )
    if position_ids is None or rows.new == 1 or position_ids.dim() != 2:
        return
    jumps = position_ids.diff(dim=-1) != 1  # [B or 1, T - 1]
    if rows.starts is not None or rows.ends is not None:
        device = position_ids.device
        starts = torch.tensor(rows.starts or (0,) * rows.batch, device=device)[:, None]
        ends = torch.tensor(rows.ends or (rows.total,) * rows.batch, device=device)[:, None]
        slots = torch.arange(rows.past, rows.total - 1, device=device)
        jumps = jumps & (slots >= starts) & (slots + 1 < ends)
    if jumps.any():
        raise _wrong_positions(position_ids, jumps)


def _wrong_positions(position_ids: Tensor, jumps: Tensor) -> UnsupportedModeError:
    """The error for positions that go back (packed sequences), or that skip or repeat."""
    row, place = jumps.expand(len(jumps), -1).nonzero()[0].tolist()
    before, after = position_ids[row, place : place + 2].tolist()
    if bool((position_ids.diff(dim=-1)[jumps] < 0).any()):
        return UnsupportedModeError(
            "position_ids jump back inside a row, which Transformers reads as packed sequences; a patched model would "
            "let them see each other. Pass one sequence per row, or run dense: model.set_attn_implementation('sdpa')."
        )
    return UnsupportedModeError(
        f"position_ids do not count on by one inside a row: {after} follows {before} in row {row}. A patched model "
        "counts the tokens of a row itself. If these are pads, pass the attention_mask; else leave position_ids out, "
        "or run dense: model.set_attn_implementation('sdpa')."
    )
