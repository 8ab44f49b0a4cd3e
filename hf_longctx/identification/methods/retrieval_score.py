"""``retrieval_score``: how often a head copies a needle while the model answers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...cache.seam import CACHE, cache_of
from ...errors import ConfigError, UnsupportedModelError
from ...model.attention_mass import weights
from ...model.observe import observe
from ...tasks.documents import Document
from .base import HeadProbe, Method

CLEAR = 0.1  # the paper's threshold of a retrieval head


@dataclass(frozen=True)
class RetrievalScore(Method):
    """Retrieval score of Wu et al. (arXiv:2404.15574): needles over lengths and depths, greedy decoding.

    At every generated token a query head scores when its largest attention weight lies on a token of the needle that is
    the token just generated. Its score in a run is the share of the needle's tokens it copied so; runs in which the
    model gets less than half of the needle right are left out.

    Attributes:
        shortest: tokens of the shortest document; 1024, or ``longest`` where that is less.
        longest: tokens of the longest; 16384, or less where the model was made for less.
        lengths: number of lengths, evenly spaced.
        depths: number of depths, evenly spaced from the beginning to the end.
        facts: facts in a document, of which one is asked for.
        samples: documents per length and depth.
    """

    paper = "arXiv:2404.15574"
    cases = ({"shortest": 256, "longest": 512, "lengths": 2, "depths": 2},)

    shortest: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    longest: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    lengths: int = field(default=5, metadata={"min": 1, "max": 1024, "unit": "lengths"})
    depths: int = field(default=10, metadata={"min": 1, "max": 1024, "unit": "depths"})
    facts: int = field(default=1, metadata={"min": 1, "max": 1024, "unit": "facts"})
    samples: int = field(default=1, metadata={"min": 1, "max": 1024, "unit": "documents"})

    @torch.no_grad()
    def scores(self, probe: HeadProbe) -> Tensor:
        lengths = self.all_lengths(probe)
        grid = [
            (length, depth, sample)
            for length in lengths
            for depth in np.linspace(0, 1, self.depths)
            for sample in range(self.samples)
        ]
        total = torch.zeros(probe.layers, probe.heads, dtype=torch.float64)
        counted = 0
        with probe.track("retrieval score", len(grid), "documents") as bar:
            for run, (length, depth, _) in enumerate(grid):
                document = probe.documents.draw(probe.rng(3, run), length, self.facts, depth)
                right, copied = copies(probe, document)
                if right >= 0.5:
                    total = total + copied
                    counted = counted + 1
                bar.advance()
        if not counted:
            raise UnsupportedModelError(
                f"retrieval_score: the model found the needle in none of {len(grid)} documents of up to {lengths[-1]} "
                "tokens, so no head can be seen copying it. Try shorter ones (longest=...), text the model knows "
                "(text=...), or method='echo_induction', which needs no answers."
            )
        probe.measured |= {"lengths": lengths, "runs": len(grid), "runs_answered": counted}
        scores = probe.per_group(total / counted)
        if scores.max() < CLEAR:
            probe.doubt(
                f"retrieval_score: no head copies more than {scores.max():.1%} of a needle, though the model answers, "
                "so this model must retrieve in another way than by attending to the very token it says next"
            )
        return scores

    def all_lengths(self, probe: HeadProbe) -> list[int]:
        """Tokens of the documents, ascending.

        Raises:
            ConfigError: the shortest are longer than the longest.
        """
        longest = probe.length(self.longest, 16384, "longest")
        shortest = min(1024, longest) if self.shortest is None else self.shortest
        if shortest > longest:
            raise ConfigError(f"shortest: got {shortest} tokens, more than the longest documents have ({longest}).")
        return [round(n) for n in np.linspace(longest, shortest, self.lengths)[::-1]]


def copies(probe: HeadProbe, document: Document) -> tuple[float, Tensor]:
    """(share of the answer that is right, share of the needle each head copied ``[layers, H]``) of one question."""
    needle = document.needles[0]
    first = document.answers[0, 0]
    ids = probe.ids(document.ids[:first])
    looked_at = torch.zeros(probe.layers, probe.heads, dtype=torch.long)

    def look(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
        last = torch.tensor([k.shape[2] - 1], device=q.device)
        for _, weight in weights(q, k, compute.scores, last):
            looked_at[layer_idx] = weight[:, 0].argmax(-1).cpu()

    place_of = torch.full((len(document.ids),), -1)
    place_of[torch.from_numpy(needle)] = torch.arange(len(needle))
    tokens = torch.from_numpy(document.ids)
    found = torch.zeros(probe.layers, probe.heads, len(needle), dtype=torch.bool)
    cache = None
    step = ids
    right = 0
    with observe(probe.model, look):
        for expected in document.ids[document.answers[0]]:
            out = probe.model(step, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            cache = cache_of(out)
            step = out.logits[:, -1:].argmax(-1)
            token = step.item()
            right += token == expected
            place = place_of[looked_at]  # -1 outside the needle, so also where a head looks at its own answer
            hit = (place >= 0) & (tokens[looked_at] == token)
            found |= torch.nn.functional.one_hot(place.clamp(min=0), len(needle)).bool() & hit[..., None]
    return right / len(needle), found.double().mean(-1)
