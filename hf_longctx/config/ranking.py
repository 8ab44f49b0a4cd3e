"""The shipped configs, best first: the order of ``hf-longctx configs``, and the table of the docs."""

from __future__ import annotations

from dataclasses import dataclass

from ..assets import OWNER
from .config import LongCtxConfig, load_shipped
from .files import shipped

LONG = 131072  # tokens
CONFIDENCES = ("measured", "low", "none")  # best first


@dataclass(frozen=True)
class Listed:
    """A shipped config. ``share``: of dense's KV bytes at ``LONG`` tokens, 0 to 1."""

    name: str
    config: LongCtxConfig
    share: float

    @property
    def embedded(self) -> bool:
        """Whether it is of a tiny model of this package."""
        return self.config.model.ids[0].startswith(f"{OWNER}/")


def ranked() -> list[Listed]:
    """Every shipped config: published checkpoints first, then by confidence, KV bytes and name."""
    found = []
    for name in shipped():
        config = load_shipped(name)
        dense, patched = config.kv_bytes(LONG)
        found.append(Listed(name, config, patched / dense))
    return sorted(
        found,
        key=lambda one: (one.embedded, CONFIDENCES.index(one.config.heads.confidence), round(one.share, 3), one.name),
    )


def published_table(best: int | None = None) -> str:
    """The published checkpoints as a Markdown table, or the ``best`` of them; those that save nothing share a row."""
    published = [one for one in ranked() if not one.embedded]
    measured = [one for one in published if one.config.heads.confidence != "none"]
    rows = [
        f"| {one.config.model.ids[0]} | {one.config.heads.confidence} | {one.share:.0%} |".replace("%", " %")
        for one in measured
    ]
    rest = [one.config.model.ids[0].rpartition("/")[2] for one in published if one not in measured]
    rows.append(f"| {', '.join(rest)} | none: run `identify` | 100 % |")
    head = ["| checkpoint | head map | KV memory at 128k tokens, of dense |", "|---|---|---|"]
    return "\n".join([*head, *rows[:best]]) + "\n"
