"""``score: expected_attention``: what queries like those so far will attend to, a little further on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..config.bounds import LARGEST, TOKENS, TOKENS_OR_NONE
from ._columns import of_kv_heads, weights_of, with_first_bias
from .base import Score, Seen

PIECE = 4096  # tokens that are taken in, or scored, at once


@dataclass(frozen=True)
class ExpectedAttention(Score):
    """Keep the tokens to which the next queries are expected to attend, as if these were normally distributed.

    Mean and covariance of the queries so far, each turned back to position 0, are turned on by the mean rotation of
    the next ``future`` positions. A score of such a query and a key k is normal as well, so its exponential is expected
    to be ``exp(m . k + k . C k / 2)``, up to the scale. These are divided by their sum over the cached tokens, the mean
    is taken over the query heads of a KV head, and the result is multiplied by the norm of the value. A cap of the
    model's scores is left out.

    Attributes:
        future: positions after the prompt of which the mean rotation is taken.
        sink: first tokens, whose queries do not count, whose keys are no part of the sum, and which stay.
        covariance: with the covariance; without it all queries are as their mean.
        value_norm: multiply by the norm of the value.
        epsilon: added to the expected attention before that.
    """

    paper: ClassVar[str] = "arXiv:2510.00636"
    gathers: ClassVar[bool] = True
    rotates: ClassVar[bool] = True
    agnostic: ClassVar[bool] = True
    cases: ClassVar = (
        {"future": 16},
        {"future": 16, "covariance": False, "value_norm": False},
        {"future": 16, "epsilon": 0.01},
    )

    future: int = field(default=512, metadata={**TOKENS, "max": 65536})
    sink: int = field(default=4, metadata={**TOKENS_OR_NONE, "max": 4096})
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = field(default=0.0, metadata={"min": 0.0, "max": LARGEST})

    def gather(self, seen: Seen) -> None:
        """Counts, means and summed squares of deviations are updated piece by piece (Chan et al.), in float32."""
        skip = min(seen.q.shape[2], max(0, self.sink - seen.first))
        for low in range(skip, seen.q.shape[2], PIECE):
            high = min(low + PIECE, seen.q.shape[2])
            back = -torch.arange(seen.first + low, seen.first + high, device=seen.q.device)
            seen.state.update(self._joined(seen.state, seen.rotation.turn(seen.q[:, :, low:high], back)))

    def _joined(self, state: dict[str, Tensor], q: Tensor) -> dict[str, Tensor]:
        """The state with more un-rotated queries ``[B, H, t, D]``."""
        mean = q.mean(2)
        count = torch.full(q.shape[:2], q.shape[2], dtype=q.dtype, device=q.device)
        new = {"count": count, "mean": mean}
        if self.covariance:
            apart = q - mean[:, :, None]
            new["spread"] = apart.transpose(2, 3) @ apart
        if "count" not in state:
            return new
        total = state["count"] + count
        share = (count / total)[..., None]
        step = mean - state["mean"]
        if self.covariance:
            between = step[..., None] * step[..., None, :] * (state["count"] * count / total)[..., None, None]
            new["spread"] = state["spread"] + new["spread"] + between
        return {**new, "count": total, "mean": state["mean"] + step * share}

    def score(self, seen: Seen) -> Tensor:
        dtype = torch.promote_types(seen.k.dtype, torch.float32)
        own = seen.positions >= self.sink
        if "count" in seen.state and seen.processed > self.sink:
            made = with_first_bias(seen, self._exponents(seen, dtype)[:, :, None])
            made = of_kv_heads(seen, weights_of(seen, made.masked_fill(~own, float("-inf")))[:, :, 0])
        else:
            made = torch.ones(seen.k.shape[:3], dtype=dtype, device=seen.k.device) / seen.k.shape[2]
        if self.value_norm:
            made = (made + self.epsilon) * seen.v.to(dtype).norm(dim=-1)
        return torch.where(own, made, made.amax(-1, keepdim=True))

    def _exponents(self, seen: Seen, dtype: torch.dtype) -> Tensor:
        """What the expected weights are exponentials of, ``[B, H, S]``."""
        scale, n = seen.scores.scale, seen.k.shape[1]
        next_ones = torch.arange(seen.processed, seen.processed + self.future, device=seen.k.device)
        ahead = seen.rotation.mean(seen.k.shape[3], next_ones).to(dtype)
        mean = (seen.state["mean"].to(dtype) @ ahead).unflatten(1, (n, -1))  # [B, n, G, D]
        spread = None
        if self.covariance:
            spread = ahead.T @ (seen.state["spread"].to(dtype) / seen.state["count"][..., None, None]) @ ahead
            spread = spread.unflatten(1, (n, -1))
        made = []
        for k in seen.k.split(PIECE, 2):
            k = k.to(dtype)
            piece = scale * mean @ k.transpose(2, 3)
            if spread is not None:
                k = k[:, :, None]
                piece = piece + scale**2 / 2 * ((k @ spread) * k).sum(-1)
            made.append(piece)
        return torch.cat(made, -1).flatten(1, 2)
