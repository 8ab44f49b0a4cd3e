"""Quantised keys and values for the tests of kernels, and what they stand for in float64, written from the codes."""

from __future__ import annotations

import math

import torch

from hf_longctx.kernels import reference
from hf_longctx.kernels._quantized import Quantised
from hf_longctx.layout.segments import Segment

SCALE = 0.3


def ints(values, device):
    return torch.tensor(values, device=device)


def random_numbers(*shape, dtype, seed):
    """Channels that differ in size and offset, as those of keys do."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=make, dtype=torch.float64) * torch.rand(shape[-1], generator=make) * 2
    return (x + torch.randn(shape[-1], generator=make)).to(dtype)


def packed(shape, tokens, bits, group, lengths=None, first=0, *, dtype, device="cpu"):
    """Random tokens, read up to ``lengths``; what nobody wrote is NaN."""
    batch, heads, _, dim = shape
    k, v = random_numbers(2, batch, heads, tokens, dim, dtype=dtype, seed=tokens + bits).to(device)
    made = Quantised.empty(k, v, heads, tokens + 2 * group, bits, group, first)
    for x in (made.k_scale, made.v_scale):
        x.fill_(math.nan)
    made.write(slice(None), 0, k, v)
    return made.seen([first + one for one in lengths or [tokens]], ints)


def numbers_of(piece):
    """k, v ``[B, n, S, D]`` in float64 that the codes stand for, and bool ``[B or 1, S]``: which of them count."""
    codes = (piece.k, piece.v)
    if piece.bits == 4:
        codes = [torch.cat([x & 15, x >> 4], -1) for x in codes]
    step, least = piece.k_scale.double().repeat_interleave(piece.group, 2).unbind(3)
    k = least + codes[0].double() * step
    v = piece.v_scale[..., 1:].double() + codes[1].double() * piece.v_scale[..., :1].double()
    filled = torch.arange(piece.slots, device=k.device) < torch.tensor(piece.lengths, device=k.device)[:, None]
    return k, v, filled


def truth(q, segments, turn=0):
    """Attention in float64 over packed and plain segments; ``turn`` gives keys the codes of others, for a control."""
    keys, values, visible, bias = [], [], [], []
    for one in segments:
        batch, heads = q.shape[0], one.k.shape[1]
        if isinstance(one, Segment):
            k, v, length = (
                *(x.double() for x in one.contents()),
                torch.as_tensor(one.length, device=q.device).view(-1, 1),
            )
            filled = torch.arange(k.shape[2], device=q.device) < length
        else:
            k, v, filled = numbers_of(one)
            k = k.roll(turn, 3)
        shape = (batch, heads, 1, k.shape[2])
        added = torch.zeros(shape, device=q.device) if one.bias is None else one.bias.double().expand(shape)
        hidden = ~filled[:, None, :, None]
        keys.append(k.masked_fill(hidden, 0)), values.append(v.masked_fill(hidden, 0))
        visible.append(filled[:, None, None].expand(batch, heads, 1, -1)), bias.append(added)
    k, v, visible, bias = (torch.cat(x, d) for x, d in ((keys, 2), (values, 2), (visible, 3), (bias, 3)))
    group = q.shape[1] // k.shape[1]
    visible, bias = (x.repeat_interleave(group, 1) for x in (visible, bias))
    return reference.attention(q.double(), k, v, visible, SCALE, bias)[0]


def cases(dtype, device="cpu"):
    """(shape (B, n, G, D), segments) of one decoded token: bits, groups, pieces, rows that differ, plain tails."""
    for shape, bits, group, cuts in (
        ((1, 1, 1, 64), 8, 16, (16,)),
        ((2, 2, 4, 64), 4, 64, (640,)),
        ((1, 2, 7, 128), 8, 48, (48 * 3, 48 * 12)),
        ((2, 1, 8, 128), 4, 16, (16, 160)),
        ((1, 2, 4, 96), 8, 64, (1088,)),
        ((3, 1, 2, 32), 4, 32, (320,)),
        ((1, 1, 3, 256), 8, 64, (128,)),
    ):
        batch, heads, _, dim = shape
        pieces, first = [], 0
        for number, tokens in enumerate(cuts):
            pieces.append(packed(shape, tokens, bits, group, None, first, dtype=dtype, device=device))
            if number + 1 == len(cuts) and batch > 1:
                lengths = [tokens, *[group * (tokens // group // 2), 0][: batch - 1]]
                pieces[-1] = packed(shape, tokens, bits, group, lengths, first, dtype=dtype, device=device)
            first += tokens
        k, v = random_numbers(2, batch, heads, 70, dim, dtype=dtype, seed=9).to(device)
        bias = torch.zeros(batch, 1, 1, 70, dtype=dtype, device=device)
        bias[-1, ..., :30] = -math.inf
        yield shape, [*pieces, Segment(k, v, 70, bias if batch > 1 else None)]
