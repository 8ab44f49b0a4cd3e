"""``ablation``: what the answers lose when a KV head streams, measured head by head and then again in rounds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...io.atomic import written_whole
from ...io.processes import Processes
from ...io.progress import Progress
from ...io.work import check_settings, work_file
from ...model.modules import state_of
from ...model.patch import patched
from ..saved import depends_on
from ..share import ExactMatch, answers
from .base import HeadProbe, Method

FILE = "ablation.json"
STREAM = 11  # of the probe's random numbers: other texts than those that the share is judged by
CLEAR = 2  # standard errors that the largest harm must be above zero

Head = tuple[int, int]  # layer, KV head


@dataclass(frozen=True)
class Ablation(Method):
    """The harm that each KV head does by streaming: the loss of the answers with it, less the loss without.

    The loss is the mean negative log-likelihood of the expected answers (teacher forcing).
    In the first round one head streams at a time and all others keep every token. Then the least harmful ``share`` of
    the heads that are left streams for good, and the next round measures the others given those, because heads stand
    in for each other. Single heads are cut off so by Michel et al. (arXiv:1905.10650), who set them to zero and go by
    a gradient; here a head keeps its sink and recent tokens and its harm is measured. A score is a place in the order
    in which heads began to stream; of those the last round measured the order is by harm.

    A head and a round cost one forward pass per document (and a short one per question, where the questions are tasks
    in plain English): about (1 - (1 - share) ** rounds) / share times heads times
    documents, so of 90 KV heads and 4 documents 996 passes by default.

    Attributes:
        length: tokens of a document; 2048, or less where the model was made for less.
        questions: asked in all, at least; a document has as many as its kind.
        rounds: measurements of the heads that are left.
        share: of the heads that are left, how many begin to stream after a round; at least one.
    """

    paper = "arXiv:1905.10650"
    cases = (
        {"length": 256, "questions": 16, "rounds": 3},
        {"length": 128, "questions": 4, "rounds": 1},
    )
    saves = True

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    questions: int = field(default=40, metadata={"min": 1, "max": 10**6, "unit": "questions"})
    rounds: int = field(default=4, metadata={"min": 1, "max": 10**4, "unit": "rounds"})
    share: float = field(default=0.25, metadata={"above": 0.0, "max": 0.9})

    def scores(self, probe: HeadProbe) -> Tensor:
        length = probe.length(self.length, 2048)
        yardstick = answers(probe, length, self.questions, STREAM)
        layers = [layer for layer in range(probe.layers) if layer not in probe.windowed]
        heads = [(layer, head) for layer in layers for head in range(probe.kv_heads)]
        settings = {"length": length, "questions": self.questions, **depends_on(probe, yardstick.texts[0])}
        file = work_file(probe.work, FILE) if Processes(probe.device).main else None  # several would each write it
        known = {} if file is None else load(file, settings)
        with probe.track("ablation", 1 + self.cost(len(heads)), "settings") as bar:
            losses = Losses(probe, yardstick, known, bar, file, settings)
            dense = losses.of(())
            right = losses.right()
            alone, order = self.rank(heads, losses)
        self._measure(probe, yardstick, length, dense, alone)
        probe.measured["dense_right"] = right
        if not right:
            probe.doubt(
                f"ablation: the dense model answers none of the {len(dense)} questions right, so how likely the "
                f"answers are may say nothing of what its heads retrieve (shorter documents: length=..., now {length})"
            )
        scores = torch.zeros(probe.layers, probe.kv_heads, dtype=torch.float64)
        for place, head in enumerate(order, 1):
            scores[head] = place / len(order)
        return scores

    def rounds_of(self, heads: int) -> list[int]:
        """How many heads each round measures."""
        left = [heads]
        while len(left) < self.rounds and left[-1] > 1:
            left.append(left[-1] - self._streams(left[-1]))
        return left

    def cost(self, heads: int) -> int:
        """How many times all documents are read, beside the dense model's."""
        return sum(self.rounds_of(heads))

    def _streams(self, left: int) -> int:
        return max(1, int(self.share * left))

    def rank(self, heads: list[Head], losses: Losses) -> tuple[dict[Head, Tensor], list[Head]]:
        """(losses of the questions with each head streaming alone, all heads, the first to stream first)."""
        streaming: list[Head] = []
        alone: dict[Head, Tensor] = {}
        for left in self.rounds_of(len(heads)):
            asked = [head for head in heads if head not in streaming]
            found = {head: losses.of((*streaming, head)) for head in asked}
            alone = alone or found
            by_harm = sorted(asked, key=lambda head: found[head].mean().item())
            streaming += by_harm[: self._streams(left)]
        return alone, [*streaming, *(head for head in by_harm if head not in streaming)]

    def _measure(
        self, probe: HeadProbe, yardstick: ExactMatch, length: int, dense: Tensor, alone: dict[Head, Tensor]
    ) -> None:
        """Leave the harm of single heads, and how far it is above what the choice of questions makes of it."""
        harm = [[0.0] * probe.kv_heads for _ in range(probe.layers)]
        errors = {}
        for (layer, head), found in alone.items():
            differences = (found - dense).tolist()
            harm[layer][head] = round(statistics.fmean(differences), 5)
            spread = statistics.stdev(differences) if len(differences) > 1 else float("inf")
            errors[layer, head] = spread / len(differences) ** 0.5
        clear = [head for head in alone if harm[head[0]][head[1]] > CLEAR * errors[head]]
        probe.measured |= {
            "length": length,
            "documents": len(yardstick.texts),
            "questions": len(dense),
            "dense_nll": round(dense.mean().item(), 5),
            "harm_alone": harm,
            "standard_error": round(statistics.median(errors.values()), 5) if len(dense) > 1 else None,
            "heads_clearly_harmful": len(clear),
        }
        if not clear:
            probe.doubt(
                f"ablation: no head that streams alone harms the answers by more than {CLEAR} standard errors over "
                f"{len(dense)} questions (ask more: questions=...)"
            )


class Losses:
    """The loss of every question, for one set of streaming heads after another; what a file knows is not measured.

    Args:
        known: losses by set, as ``load`` gives them.
        bar: advances by one for every set.
        file: where they are saved after every set, or None.
        settings: of the run, for the file.
    """

    def __init__(
        self,
        probe: HeadProbe,
        yardstick: ExactMatch,
        known: dict[str, list[float]],
        bar: Progress,
        file: Path | None,
        settings: dict[str, Any],
    ):
        self.probe = probe
        self.yardstick = yardstick
        self.known = known
        self.bar = bar
        self.file = file
        self.settings = settings
        self.hits: int | None = None

    def of(self, streaming: Collection[Head]) -> Tensor:
        """float64 ``[questions]``.

        Raises:
            ConfigError: one is nan or inf, by which no heads can be ordered; it is not saved.
        """
        name = " ".join(f"{layer}.{head}" for layer, head in sorted(streaming))
        if name not in self.known:
            found = self._measured(streaming)
            if not found.isfinite().all():
                raise ConfigError(
                    f"ablation: the loss of an answer is nan or inf with a model in {self.probe.model.dtype}. Load the "
                    "model in bfloat16 or float32."
                )
            self.known[name] = found.tolist()
            if self.file is not None:
                with written_whole(self.file) as unfinished:
                    unfinished.write_text(json.dumps({"settings": self.settings, "losses": self.known}))
        self.bar.advance(saved=self.file is not None)
        return torch.tensor(self.known[name], dtype=torch.float64)

    def right(self) -> int:
        """How many questions are answered right where no head streams."""
        if self.hits is None:  # a file knew the losses
            self.hits = int(self._answered(())[0].sum())
        return self.hits

    def _measured(self, streaming: Collection[Head]) -> Tensor:
        hits, losses = self._answered(streaming)
        if not streaming:
            self.hits = int(hits.sum())
        return losses

    def _answered(self, streaming: Collection[Head]) -> tuple[Tensor, Tensor]:
        """(which answers are right, their losses), ``[questions]`` each."""
        model = self.probe.model
        roles = [["R"] * self.probe.kv_heads for _ in range(self.probe.layers)]
        for layer, head in streaming:
            roles[layer][head] = "S"
        config = state_of(model).config.override(heads={"roles": ["".join(row) for row in roles]})
        with patched(model, config):
            hits, losses = zip(*self.yardstick.answered(model), strict=True)
        return torch.cat(hits), torch.cat(losses)


def load(path: Path, settings: dict[str, Any]) -> dict[str, list[float]]:
    """The losses that a run before has saved, none where there is no file.

    Raises:
        ConfigError: the file is something else, or was written under other settings.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        told = dict(found["settings"])
        losses = {str(name): [float(loss) for loss in one] for name, one in dict(found["losses"]).items()}
    except (OSError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"work: {path} is no state of an ablation run ({error}). Remove it, or give another folder."
        ) from None
    check_settings(path, told, settings)
    return losses
