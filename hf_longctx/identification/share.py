"""The smallest share of retrieval heads that keeps a model's answers, found by bisection."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config.config import LongCtxConfig
from ..config.head_map import usable_cuts
from ..errors import ConfigError
from ..model.modules import language_model
from ..model.patch import patched
from ..tasks.haystack import TextHaystack
from .methods.base import HeadProbe

Quality = dict[str, float]
# asked, or pieces of text read, for every share that is measured
QUESTIONS = 128
PIECES = 4


class Yardstick(ABC):
    """Measures a model dense once, and then patched in one way after another, on the same texts.

    ``model`` is whatever is to be measured: the caller patches it.
    """

    @abstractmethod
    def measure(self, model: torch.nn.Module) -> Quality:
        """Figures by name, plain floats."""

    @abstractmethod
    def drop(self, dense: Quality, patched: Quality) -> float:
        """How much of its quality the patched model lost, as a share; 0 is none."""


class ExactMatch(Yardstick):
    """Share of questions whose whole answer is the greedy choice, on documents of the probe's own kind.

    Args:
        length: tokens of a document.
        questions: asked in all, at least.
    """

    def __init__(self, probe: HeadProbe, length: int, questions: int):
        self.probe = probe
        self.texts = []
        asked = 0
        while asked < questions:
            document = probe.documents.draw(probe.rng(8, len(self.texts)), length)
            asked += len(document.answers)
            self.texts.append(document)

    def measure(self, model: torch.nn.Module) -> Quality:
        hits, losses = (torch.cat(found) for found in zip(*self.answered(model), strict=True))
        return {"exact_match": round(hits.double().mean().item(), 4), "nll": round(losses.mean().item(), 4)}

    @torch.no_grad()
    def answered(self, model: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """For each document, on the CPU: which of its ``n`` answers are right, bool ``[n]``, and the mean negative
        log-likelihood of the tokens of each, float64 ``[n]``; one forward pass.
        """
        for document in self.texts:
            places = torch.from_numpy(document.answers)
            ids = self.probe.ids(document.ids)
            first = int(places.min()) - 1
            hidden = language_model(model)(ids, use_cache=False).last_hidden_state[0, first:]
            logits = model.get_output_embeddings()(hidden[places.to(hidden.device) - 1 - first]).float()
            right = ids[0, places.to(ids.device)].to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), right, reduction="none")
            yield (logits.argmax(-1) == right).all(-1).cpu(), losses.double().mean(-1).cpu()

    def drop(self, dense: Quality, patched: Quality) -> float:
        return dense["exact_match"] - patched["exact_match"]


class NextToken(Yardstick):
    """Agreement of the next token with the dense model, and perplexity, on pieces of a text of the user's.

    Args:
        length: tokens of a piece.
        pieces: how many.

    Raises:
        ConfigError: the text is shorter than a piece.
    """

    KEPT = 256  # logits computed at once, of a vocabulary that may be large

    def __init__(self, probe: HeadProbe, text: TextHaystack, length: int, pieces: int):
        if len(text.ids) < length:
            raise ConfigError(f"text: it has {len(text.ids)} tokens, fewer than a piece (measure_tokens={length}).")
        self.probe = probe
        self.pieces = [text.sample(probe.rng(9, i), length) for i in range(pieces)]
        self.dense: list[torch.Tensor] | None = None

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> Quality:
        best = []
        loss = 0.0
        tokens = 0
        for piece in self.pieces:
            ids = self.probe.ids(piece)
            hidden = language_model(model)(ids, use_cache=False).last_hidden_state[0, :-1]
            for states, right in zip(hidden.split(self.KEPT), ids[0, 1:].split(self.KEPT), strict=True):
                logits = model.get_output_embeddings()(states).float()
                best.append(logits.argmax(-1).cpu())
                right = right.to(logits.device)
                loss += torch.nn.functional.cross_entropy(logits, right, reduction="sum").item()
                tokens += len(right)
        self.dense = best if self.dense is None else self.dense
        same = sum(int((a == b).sum()) for a, b in zip(best, self.dense, strict=True))
        return {"agreement": round(same / tokens, 4), "perplexity": round(_exp(loss / tokens), 4)}

    def drop(self, dense: Quality, patched: Quality) -> float:
        worse = 1 - dense["perplexity"] / patched["perplexity"]
        return max(1 - patched["agreement"], worse) if math.isfinite(patched["perplexity"]) else 1.0


class ShareSearch:
    """Finds the smallest share of retrieval heads that loses at most ``target`` of the dense model's quality.

    The dense model is measured when this is made, so that a model no drop can be measured on is refused early.

    Attributes:
        tokens: tokens of a text it measures on.

    Raises:
        ConfigError: the dense model answers nothing, or the user's text is shorter than ``tokens``.
    """

    def __init__(self, probe: HeadProbe, tokens: int | None, target: float):
        self.probe = probe
        self.target = target
        self.tokens = probe.length(tokens, 4096, "measure_tokens")
        haystack = probe.documents.haystack
        self.yardstick: Yardstick = (
            NextToken(probe, haystack, self.tokens, PIECES)
            if isinstance(haystack, TextHaystack)
            else ExactMatch(probe, self.tokens, QUESTIONS)
        )
        self.dense = self.yardstick.measure(probe.model)
        if self.dense.get("exact_match") == 0:
            raise ConfigError(
                "target_drop: the dense model answers none of the questions right, so no drop can be measured. Use "
                "shorter documents (measure_tokens=...), or text=..., which measures next-token agreement instead."
            )

    def smallest(self, model: torch.nn.Module, config: LongCtxConfig) -> tuple[float, list[dict[str, float]]]:
        """(share of retrieval heads, the measured curve) for the scores of ``config``, which fits ``model``."""
        scores = np.array(config.scores)

        def measure(heads: int) -> Quality:
            with patched(model, config, heads={"retrieval_fraction": round(heads / scores.size, 6)}):
                quality = self.yardstick.measure(self.probe.model)
            bar.advance()
            return quality

        cuts = usable_cuts(scores.ravel().tolist())
        with self.probe.track("share", math.ceil(math.log2(len(cuts))), "shares") as bar:
            found, curve = bisect(cuts, self.dense, measure, self.yardstick.drop, self.target)
        return round(found / scores.size, 6), curve


def bisect(
    usable: Sequence[int],
    dense: Quality,
    measure: Callable[[int], Quality],
    drop: Callable[[Quality, Quality], float],
    target: float,
) -> tuple[int, list[dict[str, float]]]:
    """(smallest usable number of retrieval heads whose drop is at most ``target``, the measured curve).

    The drop, to four decimals, is taken to fall as heads become retrieval.

    Args:
        usable: numbers of retrieval heads that can be told apart, ascending, the last one all heads.
        dense: figures with all heads.
        measure: figures with so many retrieval heads.
    """
    low = -1
    high = len(usable) - 1
    rows = [{"retrieval_heads": usable[-1], **dense, "drop": 0.0}]
    while high - low > 1:
        middle = (low + high) // 2
        quality = measure(usable[middle])
        lost = round(drop(dense, quality), 4)
        rows.append({"retrieval_heads": usable[middle], **quality, "drop": lost})
        low, high = (low, middle) if lost <= target else (middle, high)
    return usable[high], sorted(rows, key=lambda row: -row["retrieval_heads"])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
