"""The columns of ``bench decode`` whose retrieval heads read a selection of what they have cached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.words import build, wrong
from ..decode.base import Select
from ..kernels import reference
from ..layout.heads import RoleHeads
from ..layout.reads import ALL, Reads
from ..layout.scores import Scores
from ..layout.segments import Segment
from .columns import HALF, RETRIEVAL, Column
from .patterns import parse
from .settings import Settings

MOST = 64  # tokens of a turn, where a choice may be used for longer
EVERY_LAYER = {"dense_layers": 0, "min_tokens": 0}  # a layer of the benchmark is any layer


@dataclass(frozen=True)
class SelectCase:
    """A selection of the benchmark.

    Attributes:
        text: as given, ``WORD:field=value:...``.
        fields: the mapping of a config.
        spec: the same, made.
    """

    text: str
    fields: dict
    spec: Select

    @classmethod
    def of(cls, text: str) -> SelectCase:
        """The selection of a text.

        Raises:
            ConfigError: no selection, or one that reads everything.
        """
        given = parse(text, "select", "select")
        if build("decode", given, "select", "select", "retrieval").reads_all:
            raise wrong("select", text, "a selection that leaves tokens out: the other columns read all of them")
        fields = {**given, **{name: value for name, value in EVERY_LAYER.items() if name not in given}}
        return cls(text, fields, build("decode", fields, "select", "select", "retrieval"))

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(column, the column that reads everything and keeps the same)."""
        return ((self.text, RETRIEVAL), (f"half, {self.text}", HALF))

    def together(self, steps: int) -> int:
        """Tokens of a turn, at least ``steps``, that hold as many choices wherever they begin."""
        refresh = min(self.spec.refresh, MOST)
        return -(-steps // refresh) * refresh

    def columns(self, settings: Settings, dtype: torch.dtype, half: list[str]) -> dict[str, Column]:
        roles = (settings.all_heads("R"), half)
        return {
            name: Column.of(settings, dtype, own, select=self.fields)
            for (name, _), own in zip(self.names, roles, strict=True)
        }

    def answer(self, q: Tensor, k: Tensor, v: Tensor, scale: float, letters: str | None = None) -> Tensor:
        """``[1, 1, H, D]`` in float32 of q ``[1, H, 1, D]``: what a new selection reads, by definition.

        Of a layer with these roles (None: all retrieval) the retrieval heads alone choose; 0 for the others.
        """
        if letters is not None:
            heads = RoleHeads("retrieval", tuple(i for i, one in enumerate(letters) if one == "R"), len(letters))
            own = self.answer(heads.take(q, q.shape[1] // len(letters)), heads.take(k), heads.take(v), scale)
            out = own.new_zeros(1, 1, len(letters), q.shape[1] // len(letters), own.shape[3])
            out[:, :, list(heads.kv_heads)] = own.unflatten(2, (len(heads.kv_heads), -1))
            return out.flatten(2, 3)
        tokens = k.shape[2]
        wide = [Segment(k.float(), v.float(), tokens)]
        reads: Reads = ALL
        parts = []
        if self.spec.runs(tokens):
            chosen = self.spec.choose(q, self.spec.new_index(), [Segment(k, v, tokens)], tokens - 1, scale)
            reads = chosen.blocks(tokens - 1)
            if (more := chosen.estimate) is not None:
                more = Segment(more.k.float(), more.v.float(), more.length, more.bias)
                parts.append(reference.attend(q.float(), [more], ALL, Scores(scale)))
        parts.append(reference.attend(q.float(), wide, reads, Scores(scale)))
        return reference.merge(parts)[0].transpose(1, 2)
