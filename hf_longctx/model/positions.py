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


def positions_ahead(position_ids: Tensor | None, rows: Rows, before: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """How far the next position of each sequence is ahead of its tokens after this forward; None for nowhere.

    An image takes as many positions as it is high or wide, whatever number of tokens it is.

    Args:
        position_ids: as for `refuse_positions`.
        before: of the cache before this forward.
    """
    if position_ids is None or position_ids.dim() < 3 or rows.new == 1:
        return before
    starts = rows.starts or (0,) * rows.batch
    ends = rows.ends or (rows.total,) * rows.batch
    slots = torch.arange(rows.past, rows.total)
    real = torch.stack([(slots >= start) & (slots < end) for start, end in zip(starts, ends, strict=True)])
    places = _axes(position_ids).masked_fill(~real.to(position_ids.device), -1)  # [n, B, T]
    last = places.amax(dim=(0, 2)).tolist()
    counts = [min(end, rows.total) - start for start, end in zip(starts, ends, strict=True)]
    ahead = tuple(one + 1 - count if count > 0 else 0 for one, count in zip(last, counts, strict=True))
    return ahead if any(ahead) else None


def refuse_other_prompt(position_ids: Tensor | None, rows: Rows, ahead: tuple[int, ...] | None) -> None:
    """Refuse to go on from a cache by positions that were counted on from another prompt.

    A multimodal model keeps in ``rope_deltas`` how far the positions of the prompt that it read last are ahead.

    Args:
        position_ids: as for `refuse_positions`.
        ahead: of the cache, as `positions_ahead` has it.

    Raises:
        UnsupportedModeError: a sequence's first position is not the one after its last.
    """
    several = position_ids is not None and position_ids.dim() > 2
    if not several and ahead is None:
        return
    first = _axes(position_ids)[:, :, 0].amax(0).expand(rows.batch).tolist() if several else None
    for index in range(rows.batch):
        count = rows.past - (rows.starts or (0,) * rows.batch)[index]
        given = 0 if first is None else first[index] - count
        wanted = 0 if ahead is None else ahead[index]
        if count > 0 and given != wanted:
            raise UnsupportedModeError(
                f"sequence {index} of this cache goes on at position {count + wanted}, and this forward at "
                f"{count + given}: a multimodal model keeps how far images move the positions (rope_deltas) of the "
                "prompt it read last alone, and that was another. Read this prompt again with a new cache, or put back "
                "the rope_deltas that the model had when it had read it (None for text alone)."
            )


def _axes(position_ids: Tensor) -> Tensor:
    """The rotary positions ``[n, B, T]``; the first of four counts tokens."""
    return position_ids[1:] if len(position_ids) == 4 else position_ids


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
