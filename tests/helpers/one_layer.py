"""One layer of a patched model fed with random q, k, v, beside everything it was ever given."""

from __future__ import annotations

import torch

from hf_longctx import LongCtxCache
from hf_longctx.kernels import reference
from hf_longctx.layout.forward import Forward
from hf_longctx.layout.rows import Rows
from hf_longctx.layout.scores import Scores
from hf_longctx.model.layer_call import LayerCall
from hf_longctx.model.modules import state_of

SCALE = 0.3


class OneLayer:
    """Layer 0 of ``model``, whose retrieval heads are all there are; ``spec`` is that of their store."""

    def __init__(self, model, starts=(0,), max_tokens=None):
        self.model, self.starts = model, starts
        self.plan = state_of(model).plans[0]
        self.spec, self.cache = self.plan.role("retrieval").store, LongCtxCache(model, max_tokens)
        config = model.config
        self.kv_heads, self.heads, self.dim = config.num_key_value_heads, config.num_attention_heads, config.head_dim
        self.dtype = model.dtype
        self.k = self.v = torch.empty(len(starts), self.kv_heads, 0, self.dim, dtype=self.dtype)

    def random(self, heads, count):
        x = torch.randn(len(self.starts), count, heads, self.dim, dtype=self.dtype)
        return x.transpose(1, 2) + torch.arange(heads)[:, None, None]

    @property
    def seen(self):
        return self.k.shape[2]

    @property
    def store(self):
        return self.cache.layers[0].stores[0]

    def step(self, count: int) -> torch.Tensor:
        """Attention of ``count`` new tokens ``[B, H, count, D]``."""
        past, k, v = self.seen, self.random(self.kv_heads, count), self.random(self.kv_heads, count)
        self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.q = self.random(self.heads, count)
        starts = tuple(min(start, past + count) for start in self.starts)
        self.rows = Rows(len(starts), past, count, starts if any(starts) else None)
        self.forward = Forward(self.rows, prompt=self.reads_prompt(count))
        self.begin()
        kept = self.cache.update(k, v, 0)[0]
        return LayerCall(self.plan, self.forward, Scores(SCALE)).cached(self.q, kept.parts)

    def reads_prompt(self, count: int) -> bool:
        """Whether the next ``count`` tokens are of a prompt."""
        return count > 1 or not self.cache.seen

    def begin(self) -> None:
        self.cache.begin(self.forward)

    def read_as(self, row: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v ``[n, S, D]`` of a row as its queries should read them."""
        return self.k[row, :, start:], self.v[row, :, start:]

    def expected(self, **other) -> torch.Tensor:
        """The same from the rule; ``other`` makes it a wrong one."""
        past, total, outs = self.rows.past, self.rows.total, []
        for row, start in enumerate(self.starts):
            start = min(start, total)
            k, v = self.read_as(row, start, **other)
            pads = max(0, start - past)
            out = torch.zeros_like(self.q[row : row + 1])
            if k.shape[1]:
                q = self.q[row : row + 1, :, pads:]
                visible = reference.causal_visible(q.shape[2], k.shape[1])
                out[:, :, pads:] = reference.attention(q, k[None], v[None], visible, SCALE)[0]
            outs.append(out)
        return torch.cat(outs)

    def check(self, count: int, tolerance=1e-12) -> float:
        out = self.step(count)
        assert out.isfinite().all()
        error = (out - self.expected()).abs().max().item()
        assert error <= tolerance, (count, self.seen, error)
        return error
