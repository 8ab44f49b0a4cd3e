"""How much attention a block list keeps: on a trained model, and beside the A-shape that reads as many blocks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_longctx import LongCtxConfig, observe, patched
from hf_longctx.assets import asset
from hf_longctx.kernels import reference
from hf_longctx.layout.blocks import BlockList
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.tasks.documents import TinyDocuments
from hf_longctx.tasks.haystack import TinyFiller


@torch.no_grad()
def retrieval_heads(tokens: int, seed: int = 0, name: str = "tiny-llama") -> list[tuple[Tensor, Tensor, float]]:
    """(q ``[1, h, tokens, D]``, k ``[1, n, tokens, D]``, scale) of the retrieval heads, per layer."""
    model = AutoModelForCausalLM.from_pretrained(asset(name), dtype=torch.float32).eval()
    ids = TinyDocuments(TinyFiller()).draw(np.random.default_rng(seed), tokens).ids
    found = []

    def look(layer_idx, q, k, v, scaling, rows, compute) -> None:
        letters = roles[layer_idx]
        heads = RoleHeads("retrieval", tuple(i for i, role in enumerate(letters) if role == "R"), len(letters))
        if heads.kv_heads:
            found.append((heads.take(q, q.shape[1] // k.shape[1]), heads.take(k), scaling))

    with patched(model), observe(model, look):
        roles = LongCtxConfig.from_dict(model.config.longctx).roles()
        model(torch.from_numpy(ids)[None], use_cache=False)
    return found


def topics(tokens: int, count: int = 4) -> tuple[Tensor, Tensor, float]:
    """(q ``[1, 1, tokens, 16]``, k, scale) of a text whose blocks are about one of a few topics each, like queries."""
    make = torch.Generator().manual_seed(3)
    centres = 2 * torch.randn(count, 16, generator=make)
    of = torch.randint(count, (tokens // 64,), generator=make).repeat_interleave(64)
    q, k = (centres[of] + torch.randn(tokens, 16, generator=make) / 3 for _ in range(2))
    return q[None, None], k[None, None], 0.25


def attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal weights ``[B, H, T, S]``."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    hidden = ~reference.causal_visible(q.shape[2], k.shape[2])
    return (q @ keys.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf")).softmax(-1)


def kept_mass(lists: BlockList, weights: Tensor) -> Tensor:
    """The share of its attention ``weights [B, H, T, S]`` that each query head reads, ``[B, H]``: mean over queries."""
    heads = (slice(h, h + 1) for h in range(weights.shape[1]))
    return torch.cat([(weights[:, one] * lists.visible(heads=one)).sum(-1).mean(-1) for one in heads], 1)


def blocks_read(lists: BlockList) -> Tensor:
    """Blocks that each query block reads ``[B, H, NQ]``; columns count as the blocks they would fill, rounded up."""
    nq, nk, size = lists.counts.shape[2], lists.key_blocks, lists.block
    columns = nn.functional.pad(lists.column_mask(), (0, nk * size - lists.kv_len)).unflatten(-1, (nk, size)).sum(-1)
    before = torch.arange(nk) < torch.arange(nk - nq, nk)[:, None]
    single = columns[:, :, None].masked_fill(lists.block_mask() | ~before, 0).sum(-1)
    return lists.counts + -(-single // size)


def chosen(like: BlockList, worth: Tensor) -> BlockList:
    """For each query block as many blocks as it reads in ``like``: first and own, then by ``worth [.., NQ, NK]``."""
    nq, nk = like.counts.shape[2], like.key_blocks
    i, j = torch.arange(nk - nq, nk)[:, None], torch.arange(nk)
    worth = worth.masked_fill(j > i, float("-inf")).masked_fill((j == 0) | (j == i), float("inf"))
    rank = worth.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    mask = rank < blocks_read(like)[..., None]
    return BlockList.from_mask(mask, block=like.block, first=like.first, kv_len=like.kv_len)


def a_shape(like: BlockList) -> BlockList:
    """The first block and the nearest ones, as many as in ``like``."""
    return chosen(like, torch.arange(like.key_blocks).double().expand(*like.counts.shape, -1))


def worst(like: BlockList, weights: Tensor) -> BlockList:
    """The first block, the own one and those that hold least of ``weights``, as many as in ``like``."""
    blocks = weights.unflatten(3, (like.key_blocks, -1)).sum(-1).unflatten(2, (like.key_blocks, -1)).sum(3)
    return chosen(like, -blocks.double())
