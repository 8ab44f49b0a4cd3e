"""Random block lists."""

from __future__ import annotations

import math

import torch

from hf_longctx.layout.blocks import BlockList

# (first, kv_len, block): whole prompts and chunks that begin and end inside a block.
SIZES = [(0, 1, 4), (0, 4, 4), (0, 5, 4), (3, 4, 4), (4, 9, 4), (5, 8, 4), (6, 19, 4), (0, 129, 64), (63, 130, 64)]


def random_masks(first, kv_len, block, batch=2, heads=4, share=0.4, seed=0):
    """Block mask ``[B, H, NQ, NK]`` with every diagonal block, and column mask ``[B, H, kv_len]``."""
    make = torch.Generator().manual_seed(seed)
    key_blocks = -(-kv_len // block)
    query_blocks = torch.arange(first // block, key_blocks)
    blocks = torch.rand(batch, heads, len(query_blocks), key_blocks, generator=make) < share
    blocks[:, :, torch.arange(len(query_blocks)), query_blocks] = True
    return blocks, torch.rand(batch, heads, kv_len, generator=make) < share / 2


def block_list(first, kv_len, block, **kwargs) -> BlockList:
    return BlockList.from_mask(*random_masks(first, kv_len, block, **kwargs), block=block, first=first, kv_len=kv_len)


def random_qkv(made: BlockList, group: int, kv_heads=2, dim=16, dtype=torch.float64):
    """q as a projection gives it, keys and values as views of a longer buffer whose other slots are NaN."""
    batch, make = made.counts.shape[0], torch.Generator().manual_seed(made.kv_len)
    q = torch.randn(batch, made.kv_len - made.first, kv_heads * group, dim, generator=make, dtype=torch.float64)
    buffers = torch.full((2, batch, kv_heads, made.kv_len + 9, dim), math.nan, dtype=torch.float64)
    kept = buffers[..., : made.kv_len, :]
    kept.copy_(torch.randn(kept.shape, generator=make, dtype=torch.float64))
    return q.transpose(1, 2).to(dtype), *buffers.to(dtype)[..., : made.kv_len, :]


def toggled(made: BlockList) -> BlockList:
    """The list in which a query block has its own block if and only if it had not."""
    blocks = made.block_mask()
    query_blocks = torch.arange(blocks.shape[2])
    blocks[:, :, query_blocks, made.first // made.block + query_blocks] ^= True
    return rebuilt(made, blocks, made.column_mask())


def rebuilt(made: BlockList, blocks, columns) -> BlockList:
    return BlockList.from_mask(blocks, columns, block=made.block, first=made.first, kv_len=made.kv_len)
