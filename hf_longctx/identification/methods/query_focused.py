"""``query_focused``: how much more of its attention a question gives to the fact it asks for than a null question."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...model.attention_mass import weights
from ...tasks.documents import Document
from ..attention import read
from .base import HeadProbe, Method


@dataclass(frozen=True)
class QueryFocused(Method):
    """Query-focused retrieval score of QRHead (arXiv:2506.09944): attention from a question to the fact it asks for.

    The context is read once, and every question about it alone on top of that. A query head's score is the attention
    that the question's tokens give to a token of the fact, a mean over the question, less what the tokens of a null
    question give to it, added up over the fact, and a mean over all questions. As in the authors' code, tokens of a
    fact whose difference lies more than two standard deviations below the fact's mean are left out. A KV head takes the
    largest score of its group; the paper ranks query heads.

    The paper's documents are passages and its questions those of a benchmark; here a passage is one told fact among the
    filler and the question is the text before the answer. The paper calibrates by "N/A" in place of the question, and
    so do passkeys (``Documents.null``). Its released detection ranks heads by NDCG over all passages; here it is the
    score of the fact alone, as the paper defines it.

    Attributes:
        length: tokens of the document; 8192, or less where the model was made for less.
        facts: facts in a document, each of which is asked for.
        samples: documents.
    """

    paper = "arXiv:2506.09944"
    cases = ({"length": 512, "samples": 2},)

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    facts: int = field(default=8, metadata={"min": 1, "max": 1024, "unit": "facts"})
    samples: int = field(default=2, metadata={"min": 1, "max": 1024, "unit": "documents"})

    @torch.no_grad()
    def scores(self, probe: HeadProbe) -> Tensor:
        length = probe.length(self.length, 8192)
        total = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
        asked = 0
        with probe.track("query-focused", self.samples, "documents") as bar:
            for sample in range(self.samples):
                document = probe.documents.draw(probe.rng(5, sample), length, self.facts)
                found = focus(probe, document)
                total = total + found.sum(0)
                asked = asked + len(found)
                bar.advance()
        probe.measured |= {"length": length, "questions": asked}
        return probe.per_group(total / asked)


def focus(probe: HeadProbe, document: Document) -> Tensor:
    """Calibrated attention ``[questions, layers, H]`` from each question to its fact."""
    context = int(document.questions.min())
    cache = read(probe.model, probe.ids(document.ids[:context]))
    spans = [slice(*span) for span in document.facts.tolist()]
    null = _attention(probe, cache, probe.documents.null, spans)
    found = torch.zeros(len(spans), probe.layers, probe.heads, dtype=torch.float64)
    for index, (span, (first, end)) in enumerate(zip(spans, document.questions.tolist(), strict=True)):
        (given,) = _attention(probe, cache, document.ids[first:end], [span])
        more = given - null[index]
        # One token has no deviation; its threshold is its own value, and it counts.
        low = more.mean(-1, keepdim=True) - 2 * more.std(-1, keepdim=True, correction=min(1, more.shape[-1] - 1))
        found[index] = (more * (more >= low)).sum(-1)
    return found


def _attention(probe: HeadProbe, cache: object, question: np.ndarray, spans: list[slice]) -> list[Tensor]:
    """Mean attention of the tokens of a question to each token of ``spans``, ``[layers, H, tokens]`` each, float64.

    Args:
        cache: of the context; it is not changed.
    """
    found = [torch.zeros(probe.layers, probe.heads, s.stop - s.start, dtype=torch.float64) for s in spans]

    def look(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
        if layer_idx in probe.windowed:
            return
        total = k.shape[2]
        queries = torch.arange(total - q.shape[2], total, device=q.device)
        for _, weight in weights(q, k, compute.scores, queries):
            for one, span in zip(found, spans, strict=True):
                one[layer_idx] += weight[..., span].sum(1).cpu().double() / len(queries)

    read(probe.model, probe.ids(question), cache, look)
    return found
