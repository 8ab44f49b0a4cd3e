"""``two_needle``: how much of its attention a late copy of a span gives to the early copy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ...model.attention_mass import weights
from ...model.modules import language_model
from ...model.observe import observe
from .base import HeadProbe, Method


@dataclass(frozen=True)
class TwoNeedle(Method):
    """Attention mass from a late span to its early copy, as RTPurbo scores heads (arXiv:2605.16928).

    The span is a list of facts near the beginning of a document, its copy the questions about them with their answers
    at the end. Attention to any token of the list counts: a model may keep what a token says some places after it.

    Attributes:
        length: tokens of the document; 8192, or less where the model was made for less.
        facts: facts in the list.
        samples: documents, one forward pass each.
    """

    paper = "arXiv:2605.16928"
    cases = ({"length": 512},)

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    facts: int = field(default=8, metadata={"min": 1, "max": 1024, "unit": "facts"})
    samples: int = field(default=1, metadata={"min": 1, "max": 1024, "unit": "documents"})

    @torch.no_grad()
    def scores(self, probe: HeadProbe) -> Tensor:
        length = probe.length(self.length, 8192)
        mass = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
        bar = probe.track("two needles", self.samples * probe.layers, "layers")

        def look(
            late: Tensor, early: slice, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute
        ) -> None:
            for _, weight in weights(q, k, compute.scores, late.to(q.device)):
                mass[layer_idx] += weight[..., early].sum((-1, -2)).cpu().double() / len(late)
            bar.advance()

        with bar:
            for sample in range(self.samples):
                document = probe.documents.draw(probe.rng(2, sample), length, self.facts, depth=0.05)
                late = torch.from_numpy(document.answers.ravel() - 1)  # where each token of an answer is predicted
                early = slice(int(document.needles.min()), int(document.needles.max()) + 1)
                with observe(probe.model, partial(look, late, early)):
                    language_model(probe.model)(probe.ids(document.ids), use_cache=False)
        probe.measured |= {"length": length, "samples": self.samples}
        return probe.per_group(mass / self.samples)
