"""``score: surprisal``: tokens that the model did not expect are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import SHARE
from .base import Score, Seen


@dataclass(frozen=True)
class Surprisal(Score):
    """Keep the tokens of the highest surprisal, ``-log p`` of a token by those before it: in all heads the same.

    What was said of a token fades: by ``decay`` whenever it outlives a turn, which is every later eviction. The first
    token counts as the highest, as in the authors' code, and so does one whose prediction was not seen: the first that
    comes after more than 255 tokens were taken back. Tokens that were left over by another score count 0.

    Not as in the authors' code: keys stay at their true positions, and the newest tokens are kept (`recent`). The
    model's output head is run over every token once more; models that scale or cap their logits are refused.

    Attributes:
        decay: what is left of a token's surprisal, turn by turn; 1: all of it.
    """

    paper: ClassVar[str] = "arXiv:2405.12528"
    surprises: ClassVar[bool] = True
    alike: ClassVar[bool] = True
    agnostic: ClassVar[bool] = True
    by_token: ClassVar[tuple[str, ...]] = ("surprisal",)

    decay: float = field(default=1.0, metadata=SHARE)

    def score(self, seen: Seen) -> Tensor:
        shape = seen.k.shape[:3]
        dtype = torch.promote_types(seen.k.dtype, torch.float32)
        old = seen.state.get("surprisal")
        new = seen.surprisal.to(dtype)[:, None].expand(*shape[:2], -1)
        before = shape[2] - new.shape[2]
        old = new.new_zeros(*shape[:2], before) if old is None else torch.where(old < 0, old, self.decay * old)
        seen.state["surprisal"] = found = torch.cat([old, new], 2)
        return torch.where(found < 0, found.amax(-1, keepdim=True).clamp(min=0), found)
