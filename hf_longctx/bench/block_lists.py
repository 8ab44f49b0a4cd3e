"""The columns of ``bench prefill`` that read a prompt by block lists: what a prefill pattern's kernel can save."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..cache.cache import LongCtxCache
from ..kernels.base import AUTO, case_of, pick
from ..layout.blocks import BlockList
from ..layout.scores import Scores
from ..layout.segments import Segment
from ..prefill.base import BLOCK
from .columns import Column, kept_buffers, make_model, patch
from .settings import Settings


def name_of(density: int) -> str:
    """The column of block lists with ``density`` percent of the causal blocks."""
    return f"blocks {density}%"


@dataclass
class ListColumn(Column):
    """Heads that keep every token, each of which reads a block list of its own.

    Attributes:
        lists: by the tokens of the prompt.
        ran: the kernel of the last ``attend``.
    """

    lists: dict[int, BlockList] = field(default_factory=dict)
    ran: ModuleType | None = None

    @classmethod
    def of_density(cls, settings: Settings, dtype: torch.dtype, density: int, lengths: tuple[int, ...]) -> ListColumn:
        """Lists of ``density`` percent for prompts of these lengths."""
        model = patch(make_model(settings, dtype, "meta"), settings, settings.all_heads("R"))
        lists = {tokens: random_list(tokens, settings.heads, density / 100, settings.seed) for tokens in lengths}
        return cls(model, LongCtxCache(model), lists=lists)

    def attend(self, layer: int, q: Tensor, kept: tuple) -> Tensor:
        """``[B, T, H, D]``"""
        k, v = kept_buffers(kept)
        module = self.model.model.layers[layer].self_attn
        word = module.longctx_plan.kernel
        segments = [Segment(k, v, k.shape[2])]
        blocks = self.lists[q.shape[2]]
        scores = Scores(module.scaling)
        self.ran = pick(AUTO if word == "stock" else word, case_of(q, segments, blocks, scores))
        out, _ = self.ran.attend(q, segments, blocks, scores, want_lse=False)
        return out.transpose(1, 2)

    @property
    def kernel(self) -> str:
        """The kernel that ran in the last ``attend``."""
        return self.ran.NAME


def random_list(tokens: int, heads: int, density: float, seed: int) -> BlockList:
    """Block 0 and the own block of every query block, and random others up to a ``density``; head by head its own.

    Where block 0 and the own blocks are more than that already, nothing else: ask the list for its density.
    """
    count = -(-tokens // BLOCK)
    causal = count * (count + 1) // 2
    always = 2 * count - 1
    share = max(0.0, density * causal - always) / max(1, causal - always)
    mask = torch.rand(1, heads, count, count, generator=torch.Generator().manual_seed(seed)) < share
    mask[..., 0] = True
    mask |= torch.eye(count, dtype=torch.bool)
    return BlockList.from_mask(mask, block=BLOCK, first=0, kv_len=tokens)


def list_answer(q: Tensor, k: Tensor, v: Tensor, at: Tensor, blocks: BlockList) -> Tensor:
    """``[B, T, H, D]`` in float32, of queries at the positions ``at [T]`` over all keys, from the list's mask.

    The list is one per query head, or one per KV head.
    """
    mask = torch.cat([blocks.visible(i, i + 1) for i in at.tolist()], 2)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    q = q.float()
    k = k.float()
    v = v.float()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
