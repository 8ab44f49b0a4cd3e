"""How a patched model shows its queries to a score."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from helpers.tiny import config_for, tiny_model

from hf_longctx import LongCtxCache, patch_model, register
from hf_longctx.eviction.base import Seen
from hf_longctx.eviction.observed import Observed

SEEN: list[Seen] = []
MODES: list[tuple[bool, bool]] = []


@dataclasses.dataclass(frozen=True)
class Witness(Observed):
    """Observed attention, and what it was asked with."""

    paper: ClassVar[str] = "a test"

    def gather(self, seen: Seen) -> None:
        super().gather(seen)
        SEEN.append(seen)
        MODES.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))


def read(rule: dict, ids: torch.Tensor, autocast: bool) -> None:
    model = tiny_model("llama")
    store = {"store": "evicted", "rule": rule, "budget": {"share": 0.5}, "recent": 8}
    patch_model(model, config_for(model, "retrieval", stores={"retrieval": store}))
    cache = LongCtxCache(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for part in (ids[:, :400], ids[:, 400:-1], ids[:, -1:]):
            model(part, past_key_values=cache)


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_gather_without_gradients_and_autocast(autocast):
    """A product under autocast is rounded to bfloat16, whatever its factors are."""
    register("eviction", "witness", Witness)
    SEEN.clear()
    MODES.clear()
    read({"score": "witness"}, torch.randint(3, 97, (1, 801)), autocast)
    assert set(MODES) == {(False, False)} and len(SEEN) >= 4
    assert not any(x.requires_grad for seen in SEEN for x in seen.state.values())
    assert {seen.q.dtype for seen in SEEN} == {torch.bfloat16 if autocast else torch.float32}
