"""``two_needle``: how much of its attention a late copy of a span gives to the early copy."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..patch import observe
from ._attention import weights
from .base import Method, Subject


@dataclass(frozen=True)
class TwoNeedle(Method):
    """Attention mass from a late span to its early copy, as RTPurbo scores heads (arXiv:2605.16928).

    The span is a fact near the beginning of a document, its copy the question about it with its answer at the end.

    Attributes:
        length: tokens of the document; 8192, or less where the model was made for less.
        facts: facts at the beginning.
        samples: documents, one forward pass each.
    """

    paper = "arXiv:2605.16928"

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    facts: int = field(default=4, metadata={"min": 1, "max": 1024})
    samples: int = field(default=1, metadata={"min": 1, "max": 1024})

    @torch.no_grad()
    def scores(self, subject: Subject) -> Tensor:
        length = subject.length(self.length, 8192)
        mass = torch.zeros(subject.layers, subject.heads, dtype=torch.float64)
        for sample in subject.track(range(self.samples), "two needles"):
            document = subject.documents.draw(subject.rng(2, sample), length, self.facts, depth=0.05)
            # A query that reads token i of the late span can look for token i, and for i + 1, of the early one.
            late = torch.from_numpy(document.answers - 1).to(subject.device)
            early = torch.from_numpy(document.needles).to(subject.device)

            def look(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
                for queries, keys in zip(late, early, strict=True):  # noqa: B023 - runs inside this iteration
                    for _, weight in weights(q, k, scaling, queries.to(q.device)):
                        span = weight[..., keys.min() : keys.max() + 1]
                        mass[layer_idx] += span.sum((-1, -2)).cpu().double() / late.numel()  # noqa: B023

            with observe(subject.model, look):
                subject.model.base_model(subject.ids(document.ids), use_cache=False)
        subject.measured |= {"length": length, "samples": self.samples}
        return subject.per_group(mass / self.samples)
