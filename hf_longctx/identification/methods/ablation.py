"""``ablation``: what is lost when a head streams, head by head, and again among those that are left."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache.fingerprint import weights_digest
from ...config.config import LongCtxConfig
from ...config.words import dump
from ...errors import ConfigError
from ...io.atomic import written_whole
from ...io.work import check_settings, work_file
from ...model.modules import state_of, unwrap
from ...model.patch import patched
from ..share import ExactMatch
from .base import HeadProbe, Method

FILE = "ablation.json"
STREAM = 11  # of the probe's random numbers: other documents than those the share is measured on
Head = tuple[int, int]  # layer, KV head


@dataclass(frozen=True)
class Ablation(Method):
    """Streams one KV head at a time, and ranks heads by the likelihood that the right answers keep.

    In the first round every head streams alone, all others keep everything. The heads that are missed least then
    stream for good, and the next round measures every other head beside them: two heads that do the same work are
    both dispensable alone, but not together. A head's score is its place in that order, 0 to 1.

    It looks at nothing but answers, so it finds heads however they work, and it says what is possible for the other
    methods. It is the slowest: with ``n`` heads and ``r`` rounds about ``n * (r + 1) / 2`` times all documents, one
    forward pass each. DuoAttention (arXiv:2410.10819) calls a head retrieval by the same test, and finds them by
    training gates instead.

    Attributes:
        length: tokens of a document; 2048, or less where the model was made for less.
        questions: asked in all, at least; a document asks for all of its facts.
        rounds: how often the heads that are left are measured again.
    """

    paper = "arXiv:2410.10819"
    saves = True
    cases = ({"length": 512, "questions": 32, "rounds": 2}, {"length": 256, "questions": 1, "rounds": 1})

    length: int | None = field(default=None, metadata={"min": 64, "max": 2**24, "unit": "tokens"})
    questions: int = field(default=32, metadata={"min": 1, "max": 2**20, "unit": "questions"})
    rounds: int = field(default=3, metadata={"min": 1, "max": 64, "unit": "rounds"})

    def scores(self, probe: HeadProbe) -> Tensor:
        length = probe.length(self.length, 2048)
        judge = ExactMatch(probe, length, self.questions, STREAM)
        config = state_of(probe.model).config
        heads = [(i, j) for i in range(probe.layers) if i not in probe.windowed for j in range(probe.kv_heads)]
        left_after = [len(heads) * (self.rounds - done) // self.rounds for done in range(self.rounds + 1)]
        book = Book(work_file(probe.work, FILE), self._settings(probe, length) if probe.work is not None else {})
        dense = judge.exactly(probe.model)
        order: list[Head] = []
        with probe.track("ablation", sum(left_after), "heads", done=book.measured) as bar:
            for number in range(self.rounds):
                left = [head for head in heads if head not in order]
                harm = {}
                for head in left:
                    if (found := book.found(number, head)) is None:
                        found = streaming(probe, config, judge, [*order, head])
                        book.add(number, head, found)
                        bar.advance(saved=book.path is not None)
                    harm[head] = found - dense["nll"]
                order += sorted(left, key=harm.__getitem__)[: len(left) - left_after[number + 1]]
        alone = {head: book.found(0, head) - dense["nll"] for head in heads}
        probe.measured |= {
            "length": length,
            "documents": len(judge.texts),
            "dense": {name: round(value, 4) for name, value in dense.items()},
            "nll_of_one_streaming": [
                [round(alone[i, j], 5) if (i, j) in alone else None for j in range(probe.kv_heads)]
                for i in range(probe.layers)
            ],
        }
        scores = torch.zeros(probe.layers, probe.kv_heads, dtype=torch.float64)
        for place, head in enumerate(order):
            scores[head] = (place + 1) / len(heads)
        return scores

    def _settings(self, probe: HeadProbe, length: int) -> dict[str, Any]:
        """What a saved state depends on, plain data."""
        return {
            "length": length,
            "questions": self.questions,
            "rounds": self.rounds,
            "seed": probe.seed,
            "streaming": dump(state_of(probe.model).config.stores.streaming, "store"),
            "model": weights_digest(unwrap(probe.model), complete=False),
        }


def streaming(probe: HeadProbe, config: LongCtxConfig, judge: ExactMatch, heads: list[Head]) -> float:
    """Negative log-likelihood per answer token while ``heads`` stream and all others keep everything."""
    roles = [list(row) for row in config.heads.roles]
    for layer, head in heads:
        roles[layer][head] = "S"
    with patched(probe.model, config, heads={"roles": ["".join(row) for row in roles]}):
        return judge.exactly(probe.model)["nll"]


class Book:
    """What was measured so far, one number per round and head, on the disk after each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self.path = path
        self.settings = settings
        self.rounds: dict[str, dict[str, float]] = {}
        if path is not None and path.exists():
            try:
                told = json.loads(path.read_text("utf-8"))
                self.rounds = {number: dict(row) for number, row in told["rounds"].items()}
                before = dict(told["settings"])
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"work: {path} is no state of an ablation run ({error}). Remove it, or give another folder."
                ) from None
            check_settings(path, before, settings)

    @property
    def measured(self) -> int:
        """How many numbers there are."""
        return sum(map(len, self.rounds.values()))

    def found(self, number: int, head: Head) -> float | None:
        return self.rounds.get(str(number), {}).get(_name(head))

    def add(self, number: int, head: Head, value: float) -> None:
        self.rounds.setdefault(str(number), {})[_name(head)] = value
        if self.path is not None:
            with written_whole(self.path) as unfinished:
                unfinished.write_text(json.dumps({"settings": self.settings, "rounds": self.rounds}) + "\n", "utf-8")


def _name(head: Head) -> str:
    return "{}.{}".format(*head)
