"""``echo_induction``: which heads look at earlier copies of a token, and at what came after them. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError
from ...model.attention_mass import weights
from ...model.modules import language_model
from ...model.observe import observe
from .base import HeadProbe, Method

CLEAR = 10  # times chance that the best head must reach


@dataclass(frozen=True)
class EchoInduction(Method):
    """Echo and induction scores of RazorAttention (arXiv:2407.15891): one forward pass of random repeated tokens.

    Attributes:
        tokens: random tokens per copy; 2500 as in the paper, fewer where the copies would not fit the model.
        copies: how often they are repeated.
        induction_per_echo: heads taken by their induction score for every one taken by its echo score; the paper takes
            the top 14 % and the top 1 %.
    """

    paper = "arXiv:2407.15891"
    cases = ({"tokens": 256},)
    reads_documents = needs_tokenizer = False

    tokens: int | None = field(default=None, metadata={"min": 8, "max": 2**24, "unit": "tokens"})
    copies: int = field(default=4, metadata={"min": 2, "max": 1024, "unit": "copies"})
    induction_per_echo: float = field(default=14.0, metadata={"above": 0.0, "max": 1e6})

    @torch.no_grad()
    def scores(self, probe: HeadProbe) -> Tensor:
        count = self.copies
        tokens = probe.length(None if self.tokens is None else self.tokens * count, 2500 * count, "tokens") // count
        if tokens < 2:
            raise ConfigError(f"copies: got {count}, but the model was made for {probe.longest} tokens in all.")
        ids = probe.ids(probe.documents.noise(probe.rng(1), tokens)).repeat(1, count)
        echo, induction = torch.zeros(2, probe.layers, probe.heads, dtype=torch.float64)
        bar = probe.track("echo and induction", probe.layers, "layers")

        def look(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, rows, compute) -> None:
            queries = torch.arange(tokens, tokens * count, device=q.device)
            for positions, weight in weights(q, k, compute.scores, queries):
                for back in range(1, count):
                    same = (positions - back * tokens).clamp(min=-1)
                    had = same >= 0
                    at = same.clamp(min=0).expand(len(weight), -1)[..., None]
                    echo[layer_idx] += (weight.gather(-1, at)[..., 0] * had).sum(-1).cpu().double()
                    induction[layer_idx] += (weight.gather(-1, at + 1)[..., 0] * had).sum(-1).cpu().double()
            bar.advance()

        with bar, observe(probe.model, look):
            language_model(probe.model)(ids, use_cache=False)
        asked = tokens * (count - 1)
        echo[list(probe.windowed)] = induction[list(probe.windowed)] = 0  # the softmax above knows no window
        echo, induction = (probe.per_group(one / asked) for one in (echo, induction))
        # What a head that looks nowhere in particular gives to the earlier copies of a token.
        chance = sum(i // tokens / (i + 1) for i in range(tokens, tokens * count)) / asked
        best = max(echo.max().item(), induction.max().item())
        if best < CLEAR * chance:
            probe.doubt(
                f"echo_induction: no head looks at copies of random tokens (the most is {best:.4f} of its attention, "
                f"{chance:.4f} would be chance), so this model must retrieve in another way"
            )
        probe.measured |= {"tokens": tokens, "copies": count}
        probe.measured |= {name: _rounded(one) for name, one in (("echo", echo), ("induction", induction))}
        return union_order(echo, induction, self.induction_per_echo)


def union_order(echo: Tensor, induction: Tensor, ratio: float) -> Tensor:
    """Scores ``[layers, KV heads]`` in (0, 1] whose best n heads are the paper's union, whatever n is.

    The union of the best s by echo and the best ``ratio * s`` by induction grows with s; a head's place in the order is
    the s at which it enters.
    """
    enters = torch.minimum(_places(echo), _places(induction) / ratio)
    # Where two heads enter together the one with the larger sum of both scores comes first.
    order = sorted(range(enters.numel()), key=lambda i: (enters.view(-1)[i].item(), -(echo + induction).view(-1)[i]))
    scores = torch.empty(enters.numel(), dtype=torch.float64)
    scores[order] = 1 - torch.arange(len(order), dtype=torch.float64) / len(order)
    return scores.view(echo.shape)


def _places(scores: Tensor) -> Tensor:
    """Place of every head, 1 = best; equal scores in the order of the heads."""
    order = scores.flatten().argsort(descending=True, stable=True)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    return places.view(scores.shape)


def _rounded(scores: Tensor) -> list[list[float]]:
    return [[round(x, 4) for x in row] for row in scores.tolist()]
