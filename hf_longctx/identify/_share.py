"""The smallest share of retrieval heads that keeps a model's answers, found by bisection."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..errors import ConfigError
from ..tasks.haystack import TextHaystack
from .base import Subject

Quality = dict[str, float]


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
    """Share of questions whose whole answer is the greedy choice, on documents of the subject's own kind.

    Args:
        length: tokens of a document.
        questions: asked in all, at least.
    """

    def __init__(self, subject: Subject, length: int, questions: int):
        self.subject, self.texts = subject, []
        asked = 0
        while asked < questions:
            document = subject.documents.draw(subject.rng(8, len(self.texts)), length)
            asked += len(document.answers)
            self.texts.append(document)

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> Quality:
        hits, loss, tokens = [], 0.0, 0
        for document in self.texts:
            places = torch.from_numpy(document.answers)
            ids = self.subject.ids(document.ids)
            first = int(places.min()) - 1
            hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, first:]
            logits = model.get_output_embeddings()(hidden[places.to(hidden.device) - 1 - first]).float()
            right = ids[0, places.to(ids.device)].to(logits.device)
            hits += (logits.argmax(-1) == right).all(-1).tolist()
            loss += torch.nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten(), reduction="sum").item()
            tokens += right.numel()
        return {"exact_match": round(sum(hits) / len(hits), 4), "nll": round(loss / tokens, 4)}

    def drop(self, dense: Quality, patched: Quality) -> float:
        return dense["exact_match"] - patched["exact_match"]


class NextToken(Yardstick):
    """Agreement of the next token with the dense model, and perplexity, on pieces of a text of the user's.

    Args:
        length: tokens of a piece.
        pieces: how many.
    """

    KEPT = 256  # logits computed at once, of a vocabulary that may be large

    def __init__(self, subject: Subject, text: TextHaystack, length: int, pieces: int):
        self.subject = subject
        self.pieces = [text.sample(subject.rng(9, i), length) for i in range(pieces)]
        self.dense: list[torch.Tensor] | None = None

    @torch.no_grad()
    def measure(self, model: torch.nn.Module) -> Quality:
        best, loss, tokens = [], 0.0, 0
        for piece in self.pieces:
            ids = self.subject.ids(piece)
            hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
            for states, right in zip(hidden.split(self.KEPT), ids[0, 1:].split(self.KEPT), strict=True):
                logits = model.get_output_embeddings()(states).float()
                best.append(logits.argmax(-1).cpu())
                right = right.to(logits.device)
                loss += torch.nn.functional.cross_entropy(logits, right, reduction="sum").item()
                tokens += len(right)
        self.dense = best if self.dense is None else self.dense
        same = sum(int((a == b).sum()) for a, b in zip(best, self.dense, strict=True))
        return {"agreement": round(same / tokens, 4), "perplexity": round(math.exp(loss / tokens), 4)}

    def drop(self, dense: Quality, patched: Quality) -> float:
        worse = 1 - dense["perplexity"] / patched["perplexity"]
        return max(1 - patched["agreement"], worse)


def smallest(
    usable: Sequence[int], heads: int, measure: Callable[[int], Quality], yardstick: Yardstick, target: float
) -> tuple[int, list[dict[str, float]]]:
    """(number of retrieval heads, the measured curve) by bisection over ``usable`` numbers of retrieval heads.

    The drop is taken to fall as heads become retrieval; with all of them it is measured first, as the reference.

    Args:
        usable: numbers of retrieval heads that can be told apart, ascending, the last one all ``heads``.
        measure: figures with so many retrieval heads.
        target: largest drop allowed.

    Raises:
        ConfigError: the dense model answers nothing, so there is nothing to keep.
    """
    curve: dict[int, Quality] = {heads: measure(heads)}
    dense = curve[heads]
    if dense.get("exact_match") == 0:
        raise ConfigError(
            "target_drop: the dense model answers none of the questions right, so no drop can be measured. Use shorter "
            "documents (length=...), or text=..., which measures next-token agreement instead."
        )
    low, high = -1, len(usable) - 1
    while high - low > 1:
        middle = (low + high) // 2
        curve[usable[middle]] = quality = measure(usable[middle])
        if yardstick.drop(dense, quality) <= target:
            high = middle
        else:
            low = middle
    rows = [
        {"retrieval_heads": n, **curve[n], "drop": round(yardstick.drop(dense, curve[n]), 4)}
        for n in sorted(curve, reverse=True)
    ]
    return usable[high], rows


def usable_cuts(scores: np.ndarray) -> list[int]:
    """Numbers of retrieval heads, 0 and all of them included, whose cut does not fall among scores of zero.

    Heads that all scored zero were not told apart.
    """
    ranked = np.sort(scores.ravel())[::-1]
    return [n for n in range(len(ranked) + 1) if n in (0, len(ranked)) or not ranked[n - 1] == ranked[n] == 0]
