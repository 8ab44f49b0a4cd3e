"""Words of somebody's own, one of every kind, as a program outside of the package would write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_longctx import Family
from hf_longctx.decode.base import Cached, Index, Select
from hf_longctx.eviction.after.base import After, Left
from hf_longctx.eviction.base import Score, Seen
from hf_longctx.identification.methods.base import Method
from hf_longctx.kernels import reference
from hf_longctx.kernels.reference import products
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.gather import keys
from hf_longctx.prefill.base import BLOCK, PatternSpec
from hf_longctx.stores.full import Full, FullStore
from hf_longctx.tasks.synthetic.passkey import Passkey


@dataclass(frozen=True)
class Rounded(Full):
    """Keep every token, keys and values rounded to a grid.

    Attributes:
        steps: grid steps per unit.
    """

    steps: int = field(default=4, metadata={"min": 1, "max": 4096, "unit": "steps"})

    def new(self, heads, max_tokens) -> RoundedStore:
        return RoundedStore(self, heads, max_tokens)


class RoundedStore(FullStore):
    def append(self, k, v, rows):
        return super().append(self.rounded(k), self.rounded(v), rows)

    def rounded(self, x: Tensor) -> Tensor:
        return (x * self.spec.steps).round() / self.spec.steps


@dataclass(frozen=True)
class Strided(PatternSpec):
    """Read every ``every``-th key block, counted back from the own one."""

    roles = ("retrieval",)

    every: int = field(default=2, metadata={"min": 1, "max": 1024, "unit": "blocks"})

    @classmethod
    def select(cls, heads: Sequence[Strided], q: Tensor, k: Tensor, scale: float) -> BlockList:
        kv_len, first = k.shape[2], k.shape[2] - q.shape[2]
        key = torch.arange(-(-kv_len // BLOCK), device=q.device)
        back = key[first // BLOCK :, None] - key
        mask = torch.stack([(back % head.every == 0) | (key == 0) for head in heads])
        return BlockList.from_mask(mask.expand(len(q), -1, -1, -1), block=BLOCK, first=first, kv_len=kv_len)


@dataclass(frozen=True)
class Pages(Select):
    """Read the pages whose mean key has the highest product with the query.

    Attributes:
        page: tokens of a page.
    """

    page: int = field(default=16, metadata={"min": 1, "max": 128, "unit": "tokens"})

    @property
    def size(self) -> int:
        return self.page

    def scores(self, q: Tensor, index: Index, cached: Cached, low: int, high: int, scale: float) -> Tensor:
        k = keys(cached, low * self.page, high * self.page).unflatten(2, (-1, self.page)).mean(3)
        return products(q, k) * scale


@dataclass(frozen=True)
class EveryNth(Score):
    """Keep every ``nth`` token, whatever it is.

    Attributes:
        nth: distance of two tokens that are kept.
    """

    paper = "none"
    alike = agnostic = True

    nth: int = field(default=2, metadata={"min": 1, "max": 1024, "unit": "tokens"})

    def score(self, seen: Seen) -> Tensor:
        kept = (seen.positions % self.nth == 0).float()
        return kept.expand(seen.k.shape[:3])


@dataclass(frozen=True)
class Faded(After):
    """Drop what is evicted, and multiply the values that are left.

    Attributes:
        factor: of the values.
    """

    factor: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})

    def apply(self, k: Tensor, v: Tensor, bias: Tensor | None, keep: Tensor) -> Left:
        return Left(k[keep], v[keep] * self.factor, None if bias is None else bias[keep])


@dataclass(frozen=True)
class WeightNorm(Method):
    """Score a KV head by the norm of its key projection's weight."""

    paper = "none"
    reads_documents = needs_tokenizer = False

    power: float = field(default=1.0, metadata={"above": 0.0, "max": 8.0})

    def scores(self, probe) -> Tensor:
        projections = [layer.self_attn.k_proj.weight for layer in probe.model.base_model.layers]
        norms = [weight.detach().unflatten(0, (probe.kv_heads, -1)).flatten(1).norm(dim=1) for weight in projections]
        return torch.stack(norms).double().cpu() ** self.power


@dataclass(frozen=True)
class Pin(Passkey):
    """A pass key, under another word."""


class Plain:
    """The definition of attention, as a kernel of one's own."""

    NAME, PREFERENCE, READS = "plain", -1, reference.READS

    def supports(self, case) -> None:
        return None

    def attend(self, q, segments, reads, scores, want_lse=True):
        return reference.attend(q, segments, reads, scores, want_lse)


PLAIN = Plain()
FAMILY = Family(model_type="nanochat")
WORDS = {  # kind -> (word, what is registered)
    "store": ("rounded", Rounded),
    "prefill": ("strided", Strided),
    "decode": ("pages", Pages),
    "eviction": ("every_nth", EveryNth),
    "after": ("faded", Faded),
    "heads": ("weight_norm", WeightNorm),
    "task": ("pin", Pin),
    "kernel": ("plain", PLAIN),
    "family": ("nanochat", FAMILY),
}
