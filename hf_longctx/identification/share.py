"""The smallest share of retrieval heads that keeps a model's answers, found by bisection."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config.config import LongCtxConfig
from ..config.head_map import usable_cuts
from ..errors import ConfigError
from ..model.modules import language_model
from ..model.patch import patched
from ..tasks import task_from
from ..tasks.base import SEED, Sample
from ..tasks.documents import Document, PasskeyDocuments
from ..tasks.forced import forced_answers
from ..tasks.haystack import TextHaystack
from ..tasks.language import Language
from .methods.base import HeadProbe

Quality = dict[str, float]
# asked, or pieces of text read, for every share that is measured
QUESTIONS = 128
PIECES = 4
JUDGED = 8  # stream of the probe's random numbers by which shares are judged
TASKS = ("needle:variant=multi_key:needles=8:questions=8", "facts:facts=8")


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

    @abstractmethod
    def rise(self, dense: Quality, patched: Quality) -> float:
        """How much likelihood the patched model lost, in nats per token; 0 is none."""


class ExactMatch(Yardstick):
    """Share of questions whose whole answer is the greedy choice, and how likely those answers are.

    Attributes:
        texts: token ids of what is read, int64 ``[T]`` each.
    """

    texts: list[np.ndarray]

    def measure(self, model: torch.nn.Module) -> Quality:
        hits, losses = (torch.cat(found) for found in zip(*self.answered(model), strict=True))
        return {"exact_match": round(hits.double().mean().item(), 4), "nll": round(losses.mean().item(), 4)}

    @abstractmethod
    def answered(self, model: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """For each text, on the CPU: which of its ``n`` answers are right, bool ``[n]``, and the mean negative
        log-likelihood of the tokens of each, float64 ``[n]``.
        """

    def drop(self, dense: Quality, patched: Quality) -> float:
        return dense["exact_match"] - patched["exact_match"]

    def rise(self, dense: Quality, patched: Quality) -> float:
        return patched["nll"] - dense["nll"]


class DocumentAnswers(ExactMatch):
    """On documents of the probe's own kind, whose questions are answered in them: one forward pass per document.

    Args:
        length: tokens of a document.
        questions: asked in all, at least.
        stream: of the probe's random numbers.
    """

    def __init__(self, probe: HeadProbe, length: int, questions: int, stream: int):
        self.probe = probe
        self.documents: list[Document] = []
        asked = 0
        while asked < questions:
            document = probe.documents.draw(probe.rng(stream, len(self.documents)), length)
            asked += len(document.answers)
            self.documents.append(document)
        self.texts = [document.ids for document in self.documents]

    @torch.no_grad()
    def answered(self, model: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for document in self.documents:
            places = torch.from_numpy(document.answers)
            ids = self.probe.ids(document.ids)
            first = int(places.min()) - 1
            hidden = language_model(model)(ids, use_cache=False).last_hidden_state[0, first:]
            logits = model.get_output_embeddings()(hidden[places.to(hidden.device) - 1 - first]).float()
            right = ids[0, places.to(ids.device)].to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), right, reduction="none")
            yield (logits.argmax(-1) == right).all(-1).cpu(), losses.double().mean(-1).cpu()


class TaskAnswers(ExactMatch):
    """On tasks in plain English, which small models answer too: one forward pass per text, and one per question.

    Documents of passkeys want 32 random words copied. A model of 135M parameters does not do that, and what it loses
    by streaming cannot be seen in them.

    Args:
        language: of the model's tokenizer.
        length: tokens of a text and its question.
        questions: asked in all, at least.
        stream: of the probe's random numbers.
    """

    def __init__(self, probe: HeadProbe, language: Language, length: int, questions: int, stream: int):
        tasks = [task_from(task) for task in TASKS]
        self.samples: list[Sample] = []
        asked = 0
        while asked < questions:
            number = len(self.samples)
            seed = int(probe.rng(stream, number).integers(SEED["max"]))
            sample = tasks[number % len(tasks)].make(language, length, None, seed)
            asked += len(sample.questions)
            self.samples.append(sample)
        self.texts = [sample.context for sample in self.samples]

    def answered(self, model: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for sample in self.samples:
            found = forced_answers(model, sample)
            losses = torch.tensor([one.nll / one.tokens for one in found], dtype=torch.float64)
            yield torch.tensor([one.right for one in found]), losses


def answers(probe: HeadProbe, length: int, questions: int, stream: int = JUDGED) -> ExactMatch:
    """The questions that heads of the probe's model are judged by, in its tokenizer's language.

    Raises:
        ConfigError: ``length`` has no room for them.
    """
    if isinstance(probe.documents, PasskeyDocuments):
        language = probe.documents.language()
        return TaskAnswers(probe, language, length, questions, stream)
    return DocumentAnswers(probe, length, questions, stream)


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

    def rise(self, dense: Quality, patched: Quality) -> float:
        found = patched["perplexity"]
        return math.log(found / dense["perplexity"]) if math.isfinite(found) else math.inf


class ShareSearch:
    """Finds the smallest share of retrieval heads that loses at most ``target`` of the dense model's quality.

    The dense model is measured when this is made, so that a model no drop can be measured on is refused early.

    Args:
        by: ``drop`` of exact match (of a user's text: of agreement and perplexity), or ``rise`` of the negative
            log-likelihood, in nats per token.

    Attributes:
        tokens: tokens of a text it measures on.

    Raises:
        ConfigError: the dense model answers nothing, or the user's text is shorter than ``tokens``.
    """

    def __init__(self, probe: HeadProbe, tokens: int | None, target: float, by: Literal["drop", "rise"] = "drop"):
        self.probe = probe
        self.target = target
        self.by = by
        self.tokens = probe.length(tokens, 4096, "measure_tokens")
        haystack = probe.documents.haystack
        self.yardstick: Yardstick = (
            NextToken(probe, haystack, self.tokens, PIECES)
            if isinstance(haystack, TextHaystack)
            else answers(probe, self.tokens, QUESTIONS)
        )
        self.dense = self.yardstick.measure(probe.model)
        if by == "drop" and self.dense.get("exact_match") == 0:
            raise ConfigError(
                "target_drop: the dense model answers none of the questions right, so no drop can be measured. Use "
                "shorter documents (measure_tokens=...), target_nll, which measures how likely the answers are, or "
                "text=..., which measures next-token agreement."
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
            lost = getattr(self.yardstick, self.by)
            found, curve = bisect(cuts, self.dense, measure, lost, self.target, self.by)
        return round(found / scores.size, 6), curve


def bisect(
    usable: Sequence[int],
    dense: Quality,
    measure: Callable[[int], Quality],
    drop: Callable[[Quality, Quality], float],
    target: float,
    name: str = "drop",
) -> tuple[int, list[dict[str, float]]]:
    """(smallest usable number of retrieval heads whose drop is at most ``target``, the measured curve).

    The drop, to four decimals, is taken to fall as heads become retrieval; it is ``name`` in the curve.

    Args:
        usable: numbers of retrieval heads that can be told apart, ascending, the last one all heads.
        dense: figures with all heads.
        measure: figures with so many retrieval heads.
    """
    low = -1
    high = len(usable) - 1
    rows = [{"retrieval_heads": usable[-1], **dense, name: 0.0}]
    while high - low > 1:
        middle = (low + high) // 2
        quality = measure(usable[middle])
        lost = round(drop(dense, quality), 4)
        rows.append({"retrieval_heads": usable[middle], **quality, name: lost})
        low, high = (low, middle) if lost <= target else (middle, high)
    return usable[high], sorted(rows, key=lambda row: -row["retrieval_heads"])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
