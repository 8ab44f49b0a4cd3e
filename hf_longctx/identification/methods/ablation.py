"""``ablation``: what the answers lose when a KV head streams, measured head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError
from ...io.processes import Processes
from ...io.work import found_state, save_state
from ...model.modules import state_of
from ...model.patch import patched
from ..share import ExactMatch
from .base import HeadProbe, Method

FILE = "ablation.safetensors"
SAVED = ("nll",)


@dataclass(frozen=True)
class Ablation(Method):
    """Backward elimination of retrieval heads, by the likelihood of the expected answers.

    In the first round each KV head alone streams, and all others read everything. Its harm is the negative log
    likelihood of the answers then, teacher-forced: one forward pass per document. The least harmful share of the heads
    stays streaming, and in the next round the others are measured again given those. A head's score is its place in the
    order of elimination, the last one 1.

    DuoAttention (arXiv:2410.10819) splits heads by the same criterion, what is lost when they stream, but trains gates
    for it; elimination in rounds is the plain measurement. Cost: n * (rounds + 1) / 2 forward passes per document for n
    KV heads.

    Attributes:
        length: tokens of a document; 2048, or less where the model was made for less.
        questions: asked in all, at least; documents are drawn until there are so many.
        rounds: in each but the last an equal share of all heads is eliminated; the last one orders the rest.
    """

    paper = "arXiv:2410.10819"
    cases = ({"length": 256, "questions": 16}, {"length": 128, "questions": 1, "rounds": 1})
    saves = True

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    questions: int = field(default=32, metadata={"min": 1, "max": 10**6, "unit": "questions"})
    rounds: int = field(default=3, metadata={"min": 1, "max": 1024, "unit": "rounds"})

    def scores(self, probe: HeadProbe) -> Tensor:
        length = self.tokens(probe)
        yardstick = ExactMatch(probe, length, self.questions, stream=5)
        heads = [layer * probe.kv_heads + i for layer in self.layers(probe) for i in range(probe.kv_heads)]
        ranks = Processes(probe.device)
        file = None if probe.work is None else probe.work / FILE
        settings = {"questions": self.questions, "rounds": self.rounds, "length": length}
        settings |= {} if file is None else probe.settings(yardstick.texts[0])
        state = None if file is None else found_state(file, settings, SAVED, "ablation", ranks)
        shape = (self.rounds, probe.layers * probe.kv_heads)
        nll = torch.full(shape, math.nan, dtype=torch.float64) if state is None else state["nll"]  # nan: not measured
        dense = yardstick.exact(probe.model)
        sizes = shares(len(heads), self.rounds)
        total = sum(sum(sizes[done:]) for done in range(len(sizes)))
        gone: list[int] = []
        bar = probe.track("ablation", total, "heads", done=int((~nll.isnan()).sum()), shown=ranks.main)
        with bar:
            for step, size in enumerate(sizes):
                left = [head for head in heads if head not in gone]
                for head in left:
                    if nll[step, head].isnan():
                        nll[step, head] = self.harm(probe, yardstick, [*gone, head])
                        if file is not None and ranks.main:
                            save_state(file, {"nll": nll}, settings)
                        bar.advance(saved=file is not None)
                gone += sorted(left, key=lambda head: nll[step, head].item())[:size]
        if dense["exact_match"] == 0:
            probe.doubt("ablation: the model answers none of the questions right, so it has little to lose")
        self._measure(probe, yardstick, dense, nll[0].view(probe.layers, -1), length)
        scores = torch.zeros(shape[1], dtype=torch.float64)
        scores[gone] = torch.arange(1, len(gone) + 1, dtype=torch.float64) / len(gone)
        return scores.view(probe.layers, probe.kv_heads)

    def tokens(self, probe: HeadProbe) -> int:
        """Tokens of a document.

        Raises:
            ConfigError: a streaming head would read all of them.
        """
        length = probe.length(self.length, 2048)
        store = state_of(probe.model).config.stores.streaming
        if length <= store.sink + store.recent:
            raise ConfigError(
                f"length: got {length} tokens, all of which a streaming head reads ({store.sink} + {store.recent}). "
                "Use longer documents, or fewer tokens for streaming heads (sink, recent)."
            )
        return length

    @staticmethod
    def layers(probe: HeadProbe) -> list[int]:
        """Layers whose heads have a role."""
        return [layer for layer in range(probe.layers) if layer not in probe.windowed]

    @staticmethod
    def harm(probe: HeadProbe, yardstick: ExactMatch, streaming: list[int]) -> float:
        """The answers' negative log likelihood while the heads ``streaming`` (layer * KV heads + head) stream.

        Raises:
            ConfigError: it is nan or inf.
        """
        role = ["S" if head in streaming else "R" for head in range(probe.layers * probe.kv_heads)]
        rows = ["".join(role[i : i + probe.kv_heads]) for i in range(0, len(role), probe.kv_heads)]
        with patched(probe.model, state_of(probe.model).config, heads={"roles": rows}):
            found = yardstick.exact(probe.model)["nll"]
        if not math.isfinite(found):
            raise ConfigError(
                f"ablation: the answers' likelihood is nan or inf with a model in {probe.model.dtype}. Load the model "
                "in bfloat16 or float32."
            )
        return found

    def _measure(self, probe: HeadProbe, yardstick: ExactMatch, dense: dict, alone: Tensor, length: int) -> None:
        probe.measured |= {
            "length": length,
            "documents": len(yardstick.texts),
            "dense": {name: round(figure, 6) for name, figure in dense.items()},
            "nll_alone": [[None if math.isnan(x) else round(x, 6) for x in row] for row in alone.tolist()],
        }


def shares(heads: int, rounds: int) -> list[int]:
    """How many of ``heads`` are eliminated in each round, as equal as may be; rounds without any are left out."""
    ends = [heads * step // rounds for step in range(rounds + 1)]
    return [high - low for low, high in zip(ends, ends[1:], strict=False) if high > low]
