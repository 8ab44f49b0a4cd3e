"""How much attention chosen queries give to chosen tokens, from queries and keys: no T x T matrix is ever made.

Shapes: ``H`` query heads, ``T`` tokens of the text that is read, ``S`` tokens up to its end, what was cached before
included; positions count from 0, the first cached token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.cache import LongCtxCache
from ..cache.seam import CACHE
from ..cache.weights import input_device
from ..errors import ConfigError, UnsupportedModeError
from ..kernels.reference import capped
from ..layout.pieces import pieces
from ..layout.scores import Scores
from .modules import language_model
from .observe import observe
from .observed import CachedRole

ENTRIES = 2**24  # weights computed at once; 64 MiB in float32

Take = Callable[[int, Tensor, Tensor], None]  # of a layer, positions [t] and weights [H, t, S] of some queries
Spans = Sequence[slice | tuple[int, int]]


def weights(q: Tensor, k: Tensor, scores: Scores, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (positions ``[t]``, causal softmax weights ``[H, t, S]``, float32 or wider) for pieces of the queries.

    Where a sink takes its share of the softmax, the weights of a query add up to less than 1.

    Args:
        q: rotated queries ``[1, H, T, D]``, the last T of the S tokens.
        k: rotated keys ``[1, H_kv, S, D]``.
        scores: how they are made of queries and keys, without a bias.
        queries: positions (0 to S - 1, among the last T) whose weights are wanted, ascending.
    """
    (heads, new), (kv_heads, total) = q.shape[1:3], k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    slots = torch.arange(total, device=q.device)
    keys = k[0].to(dtype).transpose(1, 2)  # [H_kv, D, S]
    for piece in pieces(len(queries), heads * total, ENTRIES):
        positions = queries[piece]
        some = q[0, :, positions - (total - new)].to(dtype).unflatten(0, (kv_heads, heads // kv_heads))
        found = (some.flatten(1, 2) @ keys * scores.scale).view(heads, len(positions), total)
        found = capped(found, scores.softcap)
        found = found.masked_fill_(slots > positions[:, None], float("-inf"))
        if scores.sinks is not None:
            sinks = scores.sinks.to(found)[:, None, None].expand(-1, len(positions), 1)
            found = torch.cat([found, sinks], -1)
        yield positions, found.softmax(-1)[..., :total]


@torch.no_grad()
def token_attention(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    queries: slice | Sequence[int] | Tensor,
    take: Take,
    *,
    layers: Sequence[int] | None = None,
    cache: LongCtxCache | None = None,
) -> LongCtxCache:
    """Read a text and hand over the attention of some of its tokens to every token, layer by layer, piece by piece.

    The weights are those of each head's own store: a streaming head gives what it dropped 0. No prefill pattern and no
    dense tail is taken into account. Layers without softmax attention are not shown.

    Args:
        model: patched, in eval mode.
        ids: the text ``[T]`` or ``[1, T]``, read in one forward after what ``cache`` holds.
        queries: positions among those of the text, counted with the cached tokens; a slice counts from the end where
            it is negative.
        take: called with the layer, the positions ``[t]`` of some queries (int64, on the CPU) and their weights
            ``[H, t, S]``, float32 or wider, on the model's device. They add up to 1, but for what has no token: sinks
            without a value, and means of dropped tokens.
        layers: those that are wanted; None: all.
        cache: of one sequence, which grows by the text: give a ``fork()`` of one that others use. None: a new one.

    Returns:
        The cache, with the text.

    Raises:
        ConfigError: a query that is not among the tokens of the text, or no text.
        UnsupportedModelError: the model is not patched.
        UnsupportedModeError: the model is in training, evicts tokens by score, or the cache holds several sequences.
    """
    text = torch.as_tensor(ids).reshape(1, -1).to(input_device(model), torch.int64)
    cache = LongCtxCache(model) if cache is None else cache
    _check(model, text, cache)
    before = cache.seen
    chosen = positions_of(queries, before, before + text.shape[1])

    def look(layer_idx: int, q: Tensor, roles: tuple[CachedRole, ...], v: Any, scaling: float, rows, compute) -> None:
        if layers is not None and layer_idx not in layers:
            return
        cached = sum(len(role.heads.kv_heads) for role in roles)
        group = q.shape[1] // cached
        for piece in pieces(len(chosen), q.shape[1] * rows.total, ENTRIES):
            some = chosen[piece]
            found = q.new_zeros(q.shape[1], len(some), rows.total, dtype=torch.promote_types(q.dtype, torch.float32))
            for role in roles:
                at = role.heads.queries(group)
                found[at] = role.weights(q, some, compute.scores)
            take(layer_idx, some, found)

    with observe(model, look):
        language_model(model)(text, **{CACHE: cache}, use_cache=True)
    return cache


def attention_mass(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    queries: slice | Sequence[int] | Tensor,
    spans: Spans,
    heads: Sequence[tuple[int, int]] | None = None,
    cache: LongCtxCache | None = None,
) -> Tensor:
    """The share of their attention that some tokens give to spans of the text, a mean over these tokens.

        mass = attention_mass(model, ids, queries=slice(-8, None), spans=[(0, 120), (120, 260)])

    Args:
        model, ids, queries, cache: as for `token_attention`.
        spans: (first, end) or slices of positions, cached tokens included; they may overlap.
        heads: (layer, query head) pairs; None: all.

    Returns:
        ``[layers, H, spans]``, or with ``heads`` ``[heads, spans]``; float64 on the CPU. Layers without softmax
        attention have 0.

    Raises:
        ConfigError: as `token_attention`; or a span or a head that there is not.
        UnsupportedModelError, UnsupportedModeError: as `token_attention`.
    """
    config = language_model(model).config
    shape = (config.num_hidden_layers, config.num_attention_heads)
    for layer, head in heads or ():
        if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
            raise ConfigError(
                f"heads: got ({layer}, {head}), expected (layer, query head) below {shape[0]} and {shape[1]}."
            )
    length = len(torch.as_tensor(ids).reshape(-1)) + (0 if cache is None else cache.seen)
    bounds = [_bounds(span, length) for span in spans]
    count = len(range(*queries.indices(length))) if isinstance(queries, slice) else len(queries)
    mass = torch.zeros(*shape, len(bounds), dtype=torch.float64)

    def take(layer_idx: int, positions: Tensor, found: Tensor) -> None:
        for index, (first, end) in enumerate(bounds):
            mass[layer_idx, :, index] += found[..., first:end].sum((1, 2)).cpu().double() / count

    layers = None if heads is None else {layer for layer, _ in heads}
    token_attention(model, ids, queries, take, layers=layers, cache=cache)
    return mass if heads is None else torch.stack([mass[pair] for pair in heads])


def positions_of(queries: slice | Sequence[int] | Tensor, first: int, end: int) -> Tensor:
    """Positions of queries, int64 ``[n]`` on the CPU, ascending; all of them from ``first`` to below ``end``.

    Raises:
        ConfigError: there are none, or one is outside.
    """
    found = range(*queries.indices(end)) if isinstance(queries, slice) else queries
    positions = torch.as_tensor(list(found) if isinstance(found, range) else found, dtype=torch.int64).cpu().sort()[0]
    if not len(positions) or positions[0] < first or positions[-1] >= end:
        raise ConfigError(
            f"queries: got {queries!r}, expected positions of tokens that are read now: {first} to {end - 1}."
        )
    return positions


def _bounds(span: slice | tuple[int, int], length: int) -> tuple[int, int]:
    first, end = (span.start, span.stop) if isinstance(span, slice) else span
    if first is None or end is None or not 0 <= first < end <= length:
        raise ConfigError(f"spans: got {span!r}, expected (first, end) within the {length} tokens.")
    return first, end


def _check(model: nn.Module, text: Tensor, cache: LongCtxCache) -> None:
    if not text.shape[1]:
        raise ConfigError("ids: got no tokens, expected at least one.")
    if model.training:
        raise UnsupportedModeError("token_attention needs the model in eval mode: call model.eval() first.")
    if cache.batch_size not in (-1, 1) or cache.starts is not None:
        raise UnsupportedModeError(
            f"token_attention reads one sequence without pads, and the cache holds {cache.batch_size}"
            f"{' with pads' if cache.starts is not None else ''}. Read each sequence alone."
        )
