"""A tiny model in float64 that selects, and its logits token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_longctx import LongCtxCache, patch_model
from hf_longctx.cache.plan import LayerPlan
from hf_longctx.decode._selection import Selection
from hf_longctx.decode.base import Select
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.heads import RoleHeads
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.layout.segments import HeadKV, Segment
from hf_longctx.model.layer_call import LayerCall
from hf_longctx.stores.full import Full
from hf_longctx.stores.sink_recent import SinkRecent

from .tiny import config_for, tiny_model

SMALL = {"sink": 4, "recent": 16, "min_tokens": 0, "dense_layers": 0}  # what every selection has, for tiny texts


def selecting_model(word: str | None, store: str | dict = "full", roles: str = "mixed", **fields):
    """Patched, float64; ``word`` None: dense."""
    torch.manual_seed(0)
    model = tiny_model(head_dim=16, dtype=torch.float64)
    kept = {"retrieval": {"store": store} if isinstance(store, str) else store}
    decode = {} if word is None else {"decode": {"retrieval": {"select": word, **SMALL, **fields}}}
    patch_model(model, config_for(model, roles, stores=kept), **decode)
    return model


@torch.no_grad()
def read(model, ids: Tensor, cache: LongCtxCache, mask: Tensor | None = None, steps=()) -> Tensor:
    """Logits of each of the new tokens ``ids [B, T]``; ``steps``: lengths of the forwards before those of one token."""
    outs = []
    at = 0
    while at < ids.shape[1]:
        new = steps[len(outs)] if len(outs) < len(steps) else 1
        now = None if mask is None else mask[:, : cache.get_seq_length() + new]
        position_ids = None if now is None else (now.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        part = ids[:, at : at + new]
        out = model(part, past_key_values=cache, use_cache=True, attention_mask=now, position_ids=position_ids)
        outs.append(out.logits)
        at += new
    return torch.cat(outs, 1)


def attended(spec: Select, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: str = "auto") -> Tensor:
    """What the last token's q ``[B, H, 1, D]`` reads of k, v ``[B, n, S, D]``, by the way of a patched layer."""
    heads = RoleHeads("retrieval", tuple(range(k.shape[1])), k.shape[1])
    stores = {"retrieval": Full(), "streaming": SinkRecent()}
    plan = LayerPlan.of(9, "R" * k.shape[1], stores, kernel, decode=spec)
    part = HeadKV(heads, [Segment(k, v, k.shape[2])], Full(), selection=Selection(spec))
    call = LayerCall(plan, Forward(Rows(q.shape[0], k.shape[2] - 1, 1)), Scores(scale))
    return call.cached(q, [part])


def assert_padded_as_alone(model, text: Tensor) -> None:
    """Sequences of a left-padded batch, made of ``text [3, 170]``, give what each gives alone, in 20 decoded tokens."""
    lengths = (170, 133, 170)
    mask = torch.tensor([[int(j >= 170 - length) for j in range(170)] for length in lengths])
    together = read(model, text * mask, LongCtxCache(model), mask, steps=(150,))
    for row, length in enumerate(lengths):
        alone = read(model, text[row : row + 1, 170 - length :], LongCtxCache(model), steps=(length - 20,))
        torch.testing.assert_close(together[row, -20:], alone[0, -20:], rtol=0, atol=1e-11)
    assert (together[0, -20:] - together[2, -20:]).abs().max() > 1e-2
