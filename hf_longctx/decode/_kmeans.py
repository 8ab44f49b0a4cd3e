"""k-means of keys, the same in every run: fixed seeds, a fixed number of iterations, no random number.

Shapes: ``B`` sequences, ``n`` KV heads, ``N`` points, ``C`` clusters, ``D`` numbers of a point. Each head of each
sequence has clusters of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout.pieces import pieces

TEMPORARY = 1 << 20  # numbers of the distances that exist at once
ITERATIONS = {"min": 0, "max": 1000, "unit": "iterations"}  # metadata of a field


def clustered(points: Tensor, clusters: int, iterations: int) -> Tensor:
    """The cluster of each of ``points [B, n, N, D]``, int64 ``[B, n, N]``: Lloyd's iterations from evenly spaced ones.

    A point belongs to the nearest mean, of equally near ones to the first. A cluster that loses all its points keeps
    its mean.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    total = points.shape[2]
    seeds = torch.arange(clusters, device=points.device) * total // clusters
    centres = points[:, :, seeds]
    for _ in range(iterations):
        of = _nearest(points, centres)
        counts = sizes(of, clusters)
        centres = torch.where(counts[..., None] > 0, means(points, of, counts), centres)
    return _nearest(points, centres)


def sizes(of: Tensor, clusters: int) -> Tensor:
    """How many points each cluster has, int64 ``[B, n, C]``, where ``of [B, n, N]`` is the cluster of each point."""
    return of.new_zeros(*of.shape[:2], clusters).scatter_add_(2, of, torch.ones_like(of))


def means(points: Tensor, of: Tensor, counts: Tensor) -> Tensor:
    """The mean of each cluster's points, in float32 or wider, ``[B, n, C, D]``; 0 for one without."""
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    batch, heads, clusters = counts.shape
    first = torch.arange(batch * heads, device=of.device).view(batch, heads, 1) * clusters
    places = (of + first).flatten()
    flat = points.flatten(0, 2)
    if of.device.type == "cpu":
        sums = flat.new_zeros(batch * heads * clusters, flat.shape[1])
        sums.scatter_add_(0, places[:, None].expand_as(flat), flat)
        sums = sums.view(batch, heads, clusters, -1)
    else:  # where atomic sums are not the same in every run
        sums = _summed(points, of, clusters)
    return sums / counts.clamp(min=1)[..., None]


def _summed(points: Tensor, of: Tensor, clusters: int) -> Tensor:
    """The sum of each cluster's points, by products."""
    batch, heads, total, dim = points.shape
    sums = points.new_zeros(batch, heads, clusters, dim)
    names = torch.arange(clusters, device=of.device)[:, None]
    for some in pieces(total, batch * heads * clusters, TEMPORARY):
        sums += (of[:, :, None, some] == names).to(points.dtype) @ points[:, :, some]
    return sums


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The centre of ``centres [B, n, C, D]`` that is nearest to each point, the first of equal ones."""
    batch, heads, total, _ = points.shape
    clusters = centres.shape[2]
    flat = points.flatten(0, 1)
    half = centres.square().sum(-1).flatten(0, 1)[:, None] / 2
    centres = centres.flatten(0, 1).transpose(1, 2)
    of = torch.empty(batch * heads, total, dtype=torch.int64, device=points.device)
    for some in pieces(total, batch * heads * clusters, TEMPORARY):
        of[:, some] = torch.baddbmm(half, flat[:, some], centres, beta=-1).argmax(-1)
    return of.unflatten(0, (batch, heads))
