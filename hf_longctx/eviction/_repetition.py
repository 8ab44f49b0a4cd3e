"""A text is written out again, chunk by chunk, and each of its tokens gets the largest weight that it has there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ._columns import weights_in_pieces
from .base import Reading, Seen

BEFORE = 8  # tokens of the chunk before that a later chunk's instruction ends in, as in the authors' code


def repetitions(
    ids: Tensor, first: int, end: int, chunk: int, sink: int, instruct: Callable[[Tensor], Tensor]
) -> Iterator[Reading]:
    """What is read to judge the tokens ``first .. end`` of a text ``ids [S]``: an instruction, and a chunk again.

    Args:
        chunk: tokens repeated at once; the last chunk may reach beyond ``end``.
        sink: first tokens of the text, which are never repeated.
        instruct: gives the instruction's ids, from the tokens before the chunk; these are none for the first.
    """
    for low in range(first, end, chunk):
        high = min(low + chunk, len(ids))
        instruction = instruct(ids[max(sink, low - BEFORE) : low])
        yield Reading(torch.cat([instruction, ids[low:high]]), low, high, sink)


def largest(seen: Seen, reading: Reading) -> Tensor:
    """The largest weight of each query head on each token of a chunk, ``[B, H, end - first]``, float32 or wider.

    In a softmax over the first tokens, the chunk and the reading itself.
    """
    new = len(reading.ids)
    count = reading.end - reading.first
    low = seen.k.shape[2] - (seen.processed - reading.first)  # counted from the newest: older ones may be gone
    keys = (seen.k[:, :, : reading.sink], seen.k[:, :, low : low + count], seen.k[:, :, -new:])
    spans = ((0, reading.sink), (reading.first, reading.end), (seen.processed - new, seen.processed))
    positions = torch.cat([torch.arange(*span, device=seen.k.device) for span in spans])
    best = torch.zeros((), device=seen.k.device)
    for _, made in weights_in_pieces(replace(seen, k=torch.cat(keys, 2), positions=positions)):
        best = torch.maximum(best, made[..., reading.sink : reading.sink + count].amax(2))
    return best
