"""``kvzip``: the largest attention a head gives to a cached token while the model writes its context out again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...eviction._repetition import BEFORE, largest, repetitions
from ...eviction.base import Reading, Seen
from ..attention import read
from .base import HeadProbe, Method


@dataclass(frozen=True)
class Kvzip(Method):
    """Head-level score of KVzip (arXiv:2505.23416): attention while a context is repeated, chunk by chunk.

    The context is read once. Then every chunk of it is read again after an instruction to repeat it, on top of the
    context. The score of a cached token is the largest weight that a query of the repetition gives to it, in a softmax
    over the first token, the chunk's cached tokens and the repetition itself; that of a KV head is the largest of its
    tokens, in all query heads of its group. Both as in the authors' code, which keeps one context's scores per model.

    The paper's contexts are texts of a benchmark; here it is a document with its facts, without its questions. The
    queries of the instruction count as well, as in the paper. The first of them stands right after the context, so a
    head that looks one token back would score all that there is; the last 8 tokens of the context are left out, which
    the authors do not do.

    Attributes:
        length: tokens of the document; 8192, or less where the model was not made for that and a chunk's repetition.
        chunk: tokens repeated at once.
        facts: facts in the document; None: as many as its kind has.
        samples: documents; a head's score is the mean over them.
    """

    paper = "arXiv:2505.23416"
    cases = ({"length": 512, "chunk": 256},)

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    chunk: int = field(default=2000, metadata={"min": 16, "max": 2**20, "unit": "tokens"})
    facts: int | None = field(default=None, metadata={"min": 1, "max": 1024, "unit": "facts"})
    samples: int = field(default=1, metadata={"min": 1, "max": 1024, "unit": "documents"})

    @torch.no_grad()
    def scores(self, probe: HeadProbe) -> Tensor:
        instruction = max(len(probe.documents.repeat(np.zeros(count, dtype=np.int64))) for count in (0, BEFORE))
        room = probe.longest - instruction
        length = probe.length(self.length, min(8192, max(room // 2, room - self.chunk)))
        total = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
        with probe.track("kvzip", self.samples, "documents") as bar:
            for sample in range(self.samples):
                document = probe.documents.draw(probe.rng(6, sample), length, self.facts)
                context = document.ids[: document.questions.min()]
                total = total + repeated(probe, context, self.chunk)
                bar.advance()
        probe.measured |= {"length": length, "samples": self.samples}
        return probe.per_group(total / self.samples)


def repeated(probe: HeadProbe, context: np.ndarray, chunk: int) -> Tensor:
    """The largest weight of each query head ``[layers, H]`` on a token of ``context`` (int64 ``[T]``)."""
    best = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
    scored = len(context) - BEFORE
    cache = read(probe.model, probe.ids(context))

    def instruct(before: Tensor) -> Tensor:
        return torch.as_tensor(probe.documents.repeat(before.numpy()))

    def look(reading: Reading, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
        if layer_idx in probe.windowed:
            return
        tokens = k.shape[2]
        seen = Seen(k, v, torch.arange(tokens, device=k.device), q, tokens, compute.scores)
        weight = largest(seen, reading)[0, :, : min(reading.end, scored) - reading.first].amax(-1)
        best[layer_idx] = torch.maximum(best[layer_idx], weight.cpu().double())

    for reading in repetitions(torch.as_tensor(context), 1, scored, chunk, 1, instruct):
        read(probe.model, probe.ids(reading.ids), cache, partial(look, reading))
    return best
